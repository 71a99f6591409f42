"""Attention operations: one signature for every mechanism, checked against eager oracles."""

__version__ = "0.1.0"

from kernels.attention import attention
from kernels.checks import check_cu_seqlens
from kernels.decode import attention_decode, genetic_decode, latent_decode
from kernels.mga import closed_form_fitness, gene_fitness, genetic_attention
from kernels.mla import latent_attention
from kernels.reference import gene_keys, ring_positions, rotate
from kernels.tensors import readable

__all__ = [
    "attention",
    "attention_decode",
    "check_cu_seqlens",
    "closed_form_fitness",
    "gene_fitness",
    "gene_keys",
    "genetic_attention",
    "genetic_decode",
    "latent_attention",
    "latent_decode",
    "readable",
    "ring_positions",
    "rotate",
]
