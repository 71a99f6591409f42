"""Named cases of every op, shared by the tests."""

from .attention import ATTENTION_CASES, AttentionCase
from .decode import DECODE_CASES, DecodeCase
from .genetic import GENETIC_CASES, GENETIC_DECODE_CASES, GeneticCase, GeneticDecodeCase
from .latent import LATENT_CASES, LatentCase

__all__ = [
    "ATTENTION_CASES",
    "DECODE_CASES",
    "GENETIC_CASES",
    "GENETIC_DECODE_CASES",
    "LATENT_CASES",
    "AttentionCase",
    "DecodeCase",
    "GeneticCase",
    "GeneticDecodeCase",
    "LatentCase",
]
