"""SmolLM: a Llama-style decoder in which the attention mechanism can be swapped."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smollm.attention.base import Attention
from smollm.attention.cache import Cache
from smollm.attention.layers import Linear, RMSNorm, check_norm_eps, dropout_layer, initialise
from smollm.attention.padding import packing
from smollm.attention.rope import token_positions
from smollm.model.block import Block, SwiGLU
from smollm.model.checks import check_inputs, check_labels, checked_prototypes
from smollm.model.config import NormStrategy
from smollm.model.generate import Generator
from smollm.model.head import IGNORED, TiedHead, linear_next_token_loss, next_token_loss


def create_smollm_with_attention(
    attention_module: Attention | Sequence[Attention],
    vocab_size: int = 49152,
    embed_dim: int = 576,
    num_layers: int = 30,
    ffn_hidden_dim: int = 1536,
    max_seq_len: int = 2048,
    dropout: float = 0.0,
    use_bias: bool = False,
    tie_embeddings: bool = True,
    norm_strategy: NormStrategy = "pre",
    norm_eps: float = 1e-5,
) -> "SmolLM":
    """Build a SmolLM around a mechanism; the defaults are SmolLM2-135M's shape.

    Args:
        attention_module: the prototype, or one for each layer. Every layer gets its own, freshly
            initialised copy, made causal; a prototype itself is not used.
        vocab_size: tokens. Default 49,152.
        embed_dim: model width, which must be the prototype's. Default 576.
        num_layers: blocks. Default 30.
        ffn_hidden_dim: inner width of the SwiGLU. Default 1536.
        max_seq_len: longest sequence accepted. Default 2048.
        dropout: on embeddings and MLP outputs; the prototype carries its own. Default 0.
        use_bias: biases in the MLP; the prototype carries its own. Default False.
        tie_embeddings: the output head shares the embedding's weights. Default True.
        norm_strategy: "pre" (default), "post" or "sandwich".
        norm_eps: what the norms of blocks and of the last hidden state add to a mean square; the
            prototype carries its own. Default 1e-5.

    Returns:
        A `SmolLM` in fp32 on the CPU.

    Raises:
        TypeError, ValueError: no such module, widths or numbers of layers that disagree, an
            unknown strategy.
    """
    return SmolLM(
        attention_module,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        ffn_hidden_dim=ffn_hidden_dim,
        max_seq_len=max_seq_len,
        dropout=dropout,
        use_bias=use_bias,
        tie_embeddings=tie_embeddings,
        norm_strategy=norm_strategy,
        norm_eps=norm_eps,
    )


class SmolLM(Generator):
    """A causal language model; see `create_smollm_with_attention` for the arguments.

    With `activation_checkpointing` training keeps each block's input alone and computes the block
    again in the backward.
    """

    activation_checkpointing = False

    def __init__(
        self,
        attention_module: Attention | Sequence[Attention],
        *,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        ffn_hidden_dim: int,
        max_seq_len: int,
        dropout: float,
        use_bias: bool,
        tie_embeddings: bool,
        norm_strategy: NormStrategy,
        norm_eps: float,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "ffn_hidden_dim": ffn_hidden_dim,
            "max_seq_len": max_seq_len,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected >= 1, got {size}")
        check_norm_eps(norm_eps)
        prototypes = checked_prototypes(attention_module, num_layers, embed_dim)
        self.embed_dim = embed_dim
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        unset = torch.empty(vocab_size, embed_dim)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            unset, freeze=False
        )
        self.dropout = dropout_layer(dropout)
        self.layers = nn.ModuleList(
            Block(
                copy.deepcopy(prototype),
                SwiGLU(embed_dim, ffn_hidden_dim, use_bias, dropout),
                embed_dim,
                norm_strategy,
                norm_eps,
            )
            for prototype in prototypes
        )
        self.norm = RMSNorm(embed_dim, eps=norm_eps)
        self.lm_head: TiedHead | Linear = (
            TiedHead(self.embed_tokens)
            if tie_embeddings
            else Linear(embed_dim, vocab_size, bias=False)
        )
        for attention in self.attentions:
            attention.is_causal = True
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None) -> None:
        """Embeddings and every projection from N(0, 1 / embed_dim), biases 0, norms 1.

        Each is drawn by the seed and its name, see `smollm.attention.layers.initialise`.
        """
        initialise(self, self.embed_dim, seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        with_logits: bool = True,
    ) -> dict[str, Tensor | None]:
        """Logits, and with labels the mean cross-entropy of the next token.

        Args:
            input_ids: integers [B, T].
            attention_mask: [B, T], True at real tokens, padding at the ends. Default none.
            labels: integers [B, T], the input ids; shifted here, once. -100, padding, and the first
                token of each sequence are no targets. Default none.
            cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default none.
            cache: continue the sequences that it holds, and store these tokens. Default none.
            with_logits: False, beside labels, gives the loss alone: logits are made a few at a time
                and their gradients with them, so that memory does not grow with T * vocab_size,
                and there is no second derivative.

        Returns:
            {"logits": [B, T, vocab_size] or None, "loss": scalar fp32 in nats or None}; logits at
            padding are 0.

        Raises:
            ValueError, TypeError: wrong shapes or ids, more than max_seq_len tokens in a
                sequence, a mask that is not padding at the ends.
            RuntimeError: such a mask in a compiled graph, as it runs.
        """
        check_labels(labels, input_ids, with_logits, self.vocab_size)
        hidden, positions = self.encode(
            input_ids, attention_mask, cu_seqlens=cu_seqlens, cache=cache
        )
        logits = self.lm_head(hidden) if with_logits else None
        if labels is None:
            return {"logits": logits, "loss": None}
        targets = labels.long().masked_fill(positions == 0, IGNORED)
        loss = (
            linear_next_token_loss(hidden, self.lm_head.weight, targets)
            if logits is None
            else next_token_loss(logits, targets)
        )
        return {"logits": logits, "loss": loss}

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, embed_dim] after the last norm, and positions [T] or [B, T].

        Arguments and errors as `forward`. Padding has hidden state 0 and position 0.
        """
        check_inputs(
            input_ids,
            attention_mask,
            cu_seqlens,
            cache,
            windows=self.windows,
            max_seq_len=self.max_seq_len,
            vocab_size=self.vocab_size,
        )
        batch, tokens = input_ids.shape
        packed = None if attention_mask is None else packing(attention_mask, batch, tokens)
        if packed is not None:
            if cache is not None and (cache.in_use or packed.places is None):
                raise ValueError(
                    "attention_mask: expected no padding beside a cache in use or in a graph"
                )
            input_ids, cu_seqlens = packed.pack(input_ids), packed.cu_seqlens
        positions = token_positions(input_ids.shape[1], cu_seqlens, device=input_ids.device)
        if cache is not None:
            full = torch.full((batch,), tokens, dtype=torch.int32, device=input_ids.device)
            lengths = full if packed is None else packed.lengths
            step = cache.begin(lengths, tokens, input_ids.numel())
            if step.decoding:
                positions = step.position.view(batch, tokens)

        x = self.dropout(self.embed_tokens(input_ids))
        rotations = [attention.rotation for attention in self.attentions]
        tables = {rotation: rotation.tables(positions) for rotation in dict.fromkeys(rotations)}
        for index, block in enumerate(self.layers):
            rope = tables[rotations[index]]
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, rope, cu_seqlens, use_reentrant=False)
            else:
                x = block(x, rope, cu_seqlens, None if cache is None else cache.layers[index])
        x = self.norm(x)
        if cache is not None:
            cache.commit()
        if packed is None:
            return x, positions
        return packed.unpack(x), packed.unpack(positions.view(1, -1))

    def new_cache(self, batch_size: int, max_tokens: int) -> Cache:
        """An empty cache for batch_size sequences of at most max_tokens tokens each."""
        return Cache(self.windows, batch_size, max_tokens, self.embed_tokens.weight.device)

    @property
    def attentions(self) -> list[Attention]:
        """The attention module of each layer."""
        return [block.attention for block in self.layers if isinstance(block, Block)]

    @property
    def windows(self) -> list[int | None]:
        """The window_size of each layer."""
        return [attention.window_size for attention in self.attentions]

    def count_parameters(self) -> int:
        """Trainable parameters; tied weights count once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def parameters_by_part(self) -> dict[str, int]:
        """Those of the embedding, attention, MLP, norms and an untied head; they sum up."""
        parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
        trainable = ((n, p) for n, p in self.named_parameters() if p.requires_grad)
        for name, parameter in trainable:
            if name.startswith("embed_tokens"):
                part = "embedding"
            elif name.startswith("lm_head"):
                part = "head"
            elif ".attention." in name:
                part = "attention"
            else:
                part = "mlp" if ".mlp." in name else "norms"
            parts[part] += parameter.numel()
        return parts

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs per token, averaged over a sequence of seq_len tokens.

        2 per weight of every projection and of the head, and 2 H (D_QK + D_V) per visible
        query-key pair; training costs three times as much. Norms and softmaxes are left out.
        """
        projections = (nn.Linear, TiedHead)
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, projections))
        pairs = sum(
            attention.score_and_value_width() * visible_pairs(seq_len, attention.window_size)
            for attention in self.attentions
        )
        return 2 * weights + 2 * pairs // seq_len


def visible_pairs(tokens: int, window_size: int | None) -> int:
    """Query-key pairs under a causal mask with a window."""
    window = tokens if window_size is None else min(window_size, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window
