"The byte model over random settings: no edit reaches an earlier logit, to the bit; caches agree; every learnable tensor learns; states travel."
import numpy as np
import pytest
import torch

from adaptive_lab.bytropix import ByteModel, ByteModelConfig
from adaptive_lab.bytropix.config import fitted_rule
from adaptive_lab.data.text import stdlib_bytes
from adaptive_lab.run import weights_digest
from adaptive_lab.sampling import Sampling, stream

TEXT = stdlib_bytes(30_000)


def model_of(seed: int, **more) -> ByteModel:
    "A small model of random settings with random weights everywhere."
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    heads, levels = pick(1, 2, 4), pick(1, 2, 3)
    settings = dict(
        local_hidden_size=heads * pick(4, 8), decoder_memory_dim=pick(8, 24), num_levels=levels, hyperbolic_dims=[pick(4, 8) for _ in range(levels)], context_window=120,
        n_gram_sizes=pick([], [3], [2, 4]), n_gram_vocab_size=97, no_hierarchical_decoder=pick(False, True), num_encoder_layers=pick(0, 1, 2), num_decoder_layers=pick(1, 2),
        num_encoder_heads=heads, num_decoder_heads=heads, attention_span=pick(0, 8, 17), patching=pick("babylon", "stride", "whitespace"), mean_patch=pick(3.0, 5.0),
        experts=pick([], ["o0", "o2", "w1", "r2"], ["o1", "o3", "w0", "r3", "r5"]), rotation_types=[pick("so_n", "quat", "identity") for _ in range(levels - 1)],
        transform_types=[pick("mlp", "linear", "quat") for _ in range(levels - 1)], relative_vector_aggregation=pick("mean", "sum", "none"), tangent_flow_type=pick("mlp", "linear", "none"),
        no_level_spread=pick(False, True), no_level_descriptors=pick(False, True),
    )
    config = ByteModelConfig(**settings | more)
    torch.manual_seed(seed)
    model = ByteModel(config, fitted_rule(config, TEXT) if config.patching != "whitespace" else None)
    if model.experts:
        model.experts.fit(TEXT)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def windows(seed: int, rows: int, length: int = 120) -> torch.Tensor:
    "Text, and bytes of every kind."
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(TEXT) - length, rows)
    x = TEXT[starts[:, None] + np.arange(length)].astype(np.int64)
    x[-1] = rng.integers(0, 256, length)
    return torch.from_numpy(x)


@pytest.mark.parametrize("seed", range(16))
def test_an_edit_changes_no_logit_before_it(seed):
    model, x = model_of(seed), windows(seed, 3)
    rng = np.random.default_rng(100 + seed)
    with torch.no_grad():
        before = model(x)
        for at in [0, 1, 119, *rng.integers(2, 119, 5)]:
            y = x.clone()
            y[:, at] = (y[:, at] + torch.from_numpy(rng.integers(1, 256, 3))) % 256
            after = model(y)
            assert torch.equal(after[:, :at], before[:, :at]), (seed, at)
            assert not torch.equal(after[:, at], before[:, at])


@pytest.mark.parametrize("seed", range(0, 16, 2))
def test_bytes_that_are_added_change_no_logit(seed):
    model, x = model_of(seed), windows(seed, 2, 64)
    more = torch.cat([x, windows(seed + 1, 2, 56)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(more)[:, :64], model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_a_cache_gives_what_the_whole_window_gives(seed):
    model, x = model_of(seed), windows(seed, 3)
    cuts = sorted({0, 120, *np.random.default_rng(seed).integers(1, 120, 6)})
    with torch.no_grad():
        whole, cache = model(x), model.new_cache()
        pieces = torch.cat([model(x[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="room for 0"):
        model(x[:, :1], cache=cache)


def test_cached_generation_is_recomputation():
    model = model_of(3)
    seed = bytes(TEXT[:20])
    fast = bytes(stream(model, seed, 90, Sampling(temperature=0)))
    slow = bytearray(seed)
    with torch.no_grad():
        for _ in range(90):
            slow.append(model(torch.tensor([list(slow)])).argmax(-1)[0, -1])
    assert fast == bytes(slow[20:])


@pytest.mark.parametrize("seed", range(8))
def test_every_learnable_tensor_gets_a_gradient(seed):
    model, x = model_of(seed, dropout=0.0).train(), windows(seed, 4)
    model(x).log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None]).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    rows = [n for n in dead if "grams" in n or n == "encoder.bytes.weight"]  # rows of tables that did not occur
    assert not set(dead) - set(rows), dead


def test_a_state_travels_without_the_text():
    model, x = model_of(1, experts=["o1", "o3", "w1", "r3"], patching="babylon"), windows(1, 2)
    again = ByteModel(model.config)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))
    short = {k: v for k, v in model.state_dict().items() if not k.endswith("o3.counts")}
    with pytest.raises(RuntimeError, match="o3.counts"):
        ByteModel(model.config).load_state_dict(short)


def test_bytes_may_be_uint8_and_experts_may_be_unfitted():
    model, x = model_of(1, experts=["o1", "r2"]), windows(1, 2)
    with torch.no_grad():
        assert torch.equal(model(x.to(torch.uint8)), model(x))
    assert len(weights_digest(ByteModel(model.config))) == 64


@pytest.mark.parametrize("x", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 4), torch.full((1, 4), 256), torch.full((1, 4), -1), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 500, dtype=torch.int64), [1, 2]])
def test_what_is_no_window_of_bytes_is_refused(x):
    with pytest.raises(ValueError, match="x "):
        model_of(0)(x)
