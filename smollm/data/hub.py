"""The Hugging Face hub: datasets whose documents are streamed, and whether it can be reached."""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smollm.data.sources import Source

SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus"
HUB_SHARDS = {"fineweb-edu-dedup": 234, "cosmopedia-v2": 104}
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
OFFLINE = (
    "Without a network, `python train.py` trains on its built-in corpus, and --data-files with "
    "--tokenizer reads local files."
)


@dataclass(frozen=True)
class HubDataset(Source):
    """A dataset of the hub with a column of text, streamed.

    Args:
        dataset: OWNER/NAME.
        subset: its configuration, where it has several.
        split: "train" by default.
        text_column: the column with the text.
        files: of its split, instead of all.
        own_name: a corpus name that is reserved for it.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    files: tuple[str, ...] = ()
    own_name: str | None = None

    @classmethod
    def smollm(cls, name: str, shards: int) -> "HubDataset":
        """The first files of a part of the SmolLM corpus, about 2 GB each.

        Raises:
            ValueError: no such part, or not so many files.
        """
        if name not in HUB_SHARDS:
            raise ValueError(
                f"corpus: expected one of {list(HUB_SHARDS)}, or a name for --dataset or "
                f"--data-files, got {name!r}"
            )
        total = HUB_SHARDS[name]
        if not 1 <= shards <= total:
            raise ValueError(f"shards: expected 1 to {total} of {name}, got {shards}")
        files = tuple(f"{name}/train-{i:05d}-of-{total:05d}.parquet" for i in range(shards))
        return cls(SMOLLM_CORPUS, files=files, own_name=name)

    @property
    def plain(self) -> dict[str, Any]:
        """What it is, as JSON has it."""
        return {
            "dataset": self.dataset,
            "subset": self.subset,
            "split": self.split,
            "text_column": self.text_column,
            "files": list(self.files),
        }

    def check(self) -> None:
        """Refuse what names no dataset.

        Raises:
            ValueError: it does not.
        """
        if not HUB_NAME.fullmatch(self.dataset):
            raise ValueError(f"dataset: expected OWNER/NAME of the hub, got {self.dataset!r:.120}")

    def texts(self) -> Iterator[str]:
        """The documents, less what is null or empty.

        Raises:
            ConnectionError: it cannot be read. ValueError: no such column, or no text in it.
        """
        for row in self._rows():
            if self.text_column not in row:
                raise ValueError(
                    f"text_column: expected one of {list(row)} of {self.dataset}, got "
                    f"{self.text_column!r}"
                )
            text = row[self.text_column]
            if not isinstance(text, str | None):
                raise ValueError(
                    f"text_column: expected text in {self.text_column!r} of {self.dataset}, got "
                    f"{text!r:.80}"
                )
            if text:
                yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets

        reach_hub()
        options: dict[str, Any] = {"split": self.split, "streaming": True}
        if self.subset is not None:
            options["name"] = self.subset
        if self.files:
            options["data_files"] = {self.split: list(self.files)}
        try:
            yield from datasets.load_dataset(self.dataset, **options)
        except Exception as error:  # the library passes on whatever the network's layers raise
            raise ConnectionError(
                f"{self.dataset} could not be read: {error}. {OFFLINE}"
            ) from error


def reach_hub() -> None:
    """Without a network, go straight to the hub library's cache instead of a minute of retries."""
    import datasets
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, http.client.HTTPException):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
