"""Corpora: where documents come from, how they become token shards, and what opens those."""

from smollm.data.corpus import Corpus
from smollm.data.folders import BUILTINS
from smollm.data.hub import HubDataset
from smollm.data.load import load_corpus
from smollm.data.mixture import Mixture
from smollm.data.prepare import prepare_builtin, prepare_corpus
from smollm.data.shards import document_boundaries
from smollm.data.sources import LocalFiles

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
