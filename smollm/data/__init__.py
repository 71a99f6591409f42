"""Corpora: where documents come from, how they become token shards, and what opens those."""

from typing import TYPE_CHECKING

from smollm.data.names import BUILTINS
from smollm.lazy import exports

if TYPE_CHECKING:
    from smollm.data.corpus import Corpus
    from smollm.data.hub import HubDataset
    from smollm.data.load import load_corpus
    from smollm.data.mixture import Mixture
    from smollm.data.prepare import prepare_builtin, prepare_corpus
    from smollm.data.shards import document_boundaries
    from smollm.data.sources import LocalFiles
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "corpus": ("Corpus",),
            "hub": ("HubDataset",),
            "load": ("load_corpus",),
            "mixture": ("Mixture",),
            "prepare": ("prepare_builtin", "prepare_corpus"),
            "shards": ("document_boundaries",),
            "sources": ("LocalFiles",),
        },
    )

__all__ = [
    "BUILTINS",
    "Corpus",
    "HubDataset",
    "LocalFiles",
    "Mixture",
    "document_boundaries",
    "load_corpus",
    "prepare_builtin",
    "prepare_corpus",
]
