"""The whole text model against GraniteMoeHybridForCausalLM of transformers, weights renamed as tools/export.py does."""

import dataclasses

import pytest
import torch
import upstream
from helpers import CPU, PATTERNS, one_thread  # noqa: F401
from upstream import randomise, relative_error

from tools.export import hf_config, hf_weights
from train import GPT, PLAIN, ModelConfig, generate, pick_ops

CONFIG = ModelConfig(97, 128, d_model=64, pattern="MMAM", n_head=4, d_state=16, headdim=16, d_ff=96)
TABLES = PLAIN, pick_ops(CPU, torch.float32, "auto")


def pair(pattern, seed=0):
    """Our model and theirs with the same weights, at which every parameter counts."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, pattern=pattern)
    ours = GPT(config).eval()
    randomise(ours, seed)
    granite = upstream.granite()
    theirs = granite.GraniteMoeHybridForCausalLM(granite.GraniteMoeHybridConfig(**hf_config(config))).eval()
    theirs.load_state_dict(hf_weights(ours.state_dict(), pattern), strict=True)
    return ours, theirs


def random_tokens(length, batch=2, seed=1):
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", (1, 64, 128))
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_logits(pattern, length):
    ours, theirs = pair(pattern)
    tokens = random_tokens(length)
    expected = theirs(tokens).logits
    assert 0.5 < expected.std() < 5, "logits at a scale where 1e-4 means something"
    for ops in TABLES:
        ours.use(ops)
        logits, loss = ours(tokens)
        assert loss is None
        assert (logits - expected).abs().max() <= 1e-4
        assert relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize("ops", TABLES, ids=["plain", "fast"])
def test_loss_and_gradients(ops):
    """Targets are the next tokens, some without loss; theirs shifts by itself. Gradients are compared by our names."""
    ours, theirs = pair("MMAM")
    ours.use(ops)
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
    for name, gradient in hf_weights(gradients, "MMAM").items():
        assert relative_error(gradient, theirs_by_name[name].grad) <= 1e-4, name


def test_same_number_of_parameters():
    ours, theirs = pair("MMAM")
    assert ours.head.weight is ours.embed.weight
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_greedy_continuation():
    """Every token that we pick from carried states is the one that their pass over the text so far likes best."""
    ours, theirs = pair("MMAM")
    tokens = random_tokens(9)
    new, _ = generate(ours, tokens, torch.tensor([9, 9]), 12)
    assert new.shape == (2, 12)
    logits = theirs(torch.cat([tokens, new], dim=1)).logits[:, 8:-1]
    assert (logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).max() <= 1e-4
