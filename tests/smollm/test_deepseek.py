"""MLA against a peer: Hugging Face's DeepseekV3 attention with the same weights."""

import pytest
import torch

from smollm import MultiHeadLatentAttention

deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

EMBED, HEADS, LATENT, ROPE = 96, 6, 40, 8


WIDTHS = [(None, None, None), (56, None, None), (None, 20, 12)]


def halves_to_pairs(rows, width):
    """Rows that rotate as x[i], x[i + width/2], in DeepSeek's order: x[2i], x[2i + 1]."""
    kept, rotated = rows[..., :-width, :], rows[..., -width:, :]
    first, second = rotated.chunk(2, dim=-2)
    pairs = torch.stack((first, second), dim=-2).flatten(-3, -2)
    return torch.cat((kept, pairs), dim=-2)


def weights_for_deepseek(ours):
    """Our parameters, or their gradients, by DeepSeek's names."""
    per_head = (HEADS, -1)
    q = ours.pop("q_proj.weight", None)
    name = "q_proj.weight"
    if q is None:
        q, name = ours.pop("q_proj.up_proj.weight"), "q_b_proj.weight"
    theirs = {
        name: halves_to_pairs(q.unflatten(0, per_head), ROPE).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": halves_to_pairs(ours.pop("kv_down_proj.weight"), ROPE),
    }
    names = {
        "q_proj.down_proj.weight": "q_a_proj.weight",
        "q_proj.latent_norm.weight": "q_a_layernorm.weight",
        "latent_norm.weight": "kv_a_layernorm.weight",
        "kv_up_proj.weight": "kv_b_proj.weight",
        "out_proj.weight": "o_proj.weight",
    }
    return theirs | {names[name]: x for name, x in ours.items()}


@pytest.mark.parametrize(("q_latent_dim", "head_dim", "value_dim"), WIDTHS)
def test_deepseek_v3_with_the_same_weights_gives_the_same(q_latent_dim, head_dim, value_dim):
    ours = MultiHeadLatentAttention(
        EMBED, HEADS, LATENT, ROPE, q_latent_dim, bias=False, is_causal=True,
        head_dim=head_dim, value_dim=value_dim,
    )  # fmt: skip
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    config = deepseek.DeepseekV3Config(
        hidden_size=EMBED, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        q_lora_rank=q_latent_dim, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE,
        qk_nope_head_dim=head_dim or 16, v_head_dim=value_dim or 16, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        attn_implementation="eager",
    )  # fmt: skip
    theirs = deepseek.DeepseekV3Attention(config, layer_idx=0)
    theirs.load_state_dict(weights_for_deepseek(dict(ours.state_dict())))

    x = torch.randn(2, 23, EMBED, requires_grad=True)
    tables = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.arange(23)[None])
    unseen = torch.full((23, 23), float("-inf")).triu(1)
    o, expected = ours(x), theirs(x, tables, unseen[None, None])[0]
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)

    do = torch.randn_like(o)
    gradients = []
    for output, module in ((o, ours), (expected, theirs)):
        parameters = dict(module.named_parameters())
        dx, *rest = torch.autograd.grad(output, [x, *parameters.values()], do)
        gradients.append((dx, dict(zip(parameters, rest, strict=True))))
    (dx, ours_by_name), (expected_dx, expected_by_name) = gradients
    torch.testing.assert_close(dx, expected_dx, atol=1e-5, rtol=1e-4)
    mapped = weights_for_deepseek(ours_by_name)
    assert mapped.keys() == expected_by_name.keys()
    for name, gradient in mapped.items():
        torch.testing.assert_close(gradient, expected_by_name[name], atol=2e-5, rtol=1e-4)
