"""The whole text model against GraniteMoeHybridForCausalLM of transformers, weights copied."""

import dataclasses

import pytest
import torch
import upstream
from upstream import randomise, relative_error

from train import GPT, ModelConfig

CONFIG = ModelConfig(
    vocab_size=97, block_size=128, d_model=64, pattern="MMAM", n_head=4, d_state=16, headdim=16, d_ff=96
)


def granite_config(config):
    """Their settings for our architecture; their defaults differ (norm eps 1e-6, attention not scaled, 8 experts)."""
    heads = 2 * config.d_model // config.headdim
    return upstream.granite().GraniteMoeHybridConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        max_position_embeddings=config.block_size,
        num_hidden_layers=len(config.pattern),
        layer_types=[{"M": "linear_attention", "A": "full_attention"}[letter] for letter in config.pattern],
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_head,
        attention_multiplier=(config.d_model // config.n_head) ** -0.5,
        position_embedding_type="rope",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        shared_intermediate_size=config.d_ff,
        num_local_experts=0,
        num_experts_per_tok=0,
        tie_word_embeddings=True,
        use_cache=False,
        mamba_n_heads=heads,
        mamba_d_head=config.headdim,
        mamba_d_state=config.d_state,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=64,
        bos_token_id=None,
        eos_token_id=None,
    )


def granite_state_dict(weights, pattern):
    """Our tensors under their names: a renaming, but for qkv, which they keep as three."""
    renamed = {
        "model.embed_tokens.weight": weights["embed.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    mamba = (
        "dt_bias",
        "A_log",
        "D",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "norm.weight",
        "out_proj.weight",
    )
    for i, letter in enumerate(pattern):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        renamed[theirs + "input_layernorm.weight"] = weights[ours + "norm1.weight"]
        renamed[theirs + "post_attention_layernorm.weight"] = weights[ours + "norm2.weight"]
        renamed[theirs + "shared_mlp.input_linear.weight"] = weights[ours + "mlp.up.weight"]
        renamed[theirs + "shared_mlp.output_linear.weight"] = weights[ours + "mlp.down.weight"]
        if letter == "M":
            renamed |= {f"{theirs}mamba.{name}": weights[f"{ours}mixer.{name}"] for name in mamba}
        else:
            for name, rows in zip("qkv", weights[ours + "mixer.qkv.weight"].chunk(3), strict=True):
                renamed[f"{theirs}self_attn.{name}_proj.weight"] = rows
            renamed[theirs + "self_attn.o_proj.weight"] = weights[ours + "mixer.out_proj.weight"]
    return renamed


def pair(pattern, seed=0):
    """Our model and theirs with the same weights, at which every parameter counts."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, pattern=pattern)
    ours = GPT(config).eval()
    randomise(ours, seed)
    theirs = upstream.granite().GraniteMoeHybridForCausalLM(granite_config(config)).eval()
    theirs.load_state_dict(granite_state_dict(ours.state_dict(), pattern), strict=True)
    return ours, theirs


def random_tokens(length, batch=2, seed=1):
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", (1, 64, 128))
@pytest.mark.parametrize("pattern", ("MMAM", "MAMA", "MMMM", "AAAA"))
@torch.no_grad()
def test_logits(pattern, length):
    ours, theirs = pair(pattern)
    tokens = random_tokens(length)
    logits, loss = ours(tokens)
    expected = theirs(tokens).logits
    assert loss is None
    assert 0.5 < expected.std() < 5, "logits at a scale where 1e-4 means something"
    assert (logits - expected).abs().max() <= 1e-4
    assert relative_error(logits, expected) <= 1e-5


def test_loss_and_gradients():
    """Targets are the next tokens, some without loss; theirs shifts by itself. Gradients are compared by our names."""
    ours, theirs = pair("MMAM")
    tokens = random_tokens(100)
    labels = tokens.clone()
    labels[0, 20:40] = labels[1, 90:] = -100
    _, loss = ours(tokens[:, :-1], labels[:, 1:])
    expected = theirs(tokens, labels=labels).loss
    assert (loss - expected).abs() <= 1e-5
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients["head.weight"] = gradients["embed.weight"]  # tied
    theirs_by_name = dict(theirs.named_parameters(remove_duplicate=False))
    for name, gradient in granite_state_dict(gradients, "MMAM").items():
        assert relative_error(gradient, theirs_by_name[name].grad) <= 1e-4, name


def test_same_number_of_parameters():
    ours, theirs = pair("MMAM")
    assert ours.head.weight is ours.embed.weight
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_greedy_continuation():
    """Every token that our incremental decoding picks is the one their full pass over the text so far likes best."""
    ours, theirs = pair("MMAM")
    tokens = random_tokens(9)
    new, _ = ours.generate(tokens, max_new_tokens=12)
    assert new.shape == (2, 12)
    logits = theirs(torch.cat([tokens, new], dim=1)).logits[:, 8:-1]
    assert (logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).max() <= 1e-4
