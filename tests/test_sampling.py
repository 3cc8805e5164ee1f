"Choosing the next byte and generating with a cache: what holds for every setting, while a model changes, and with bad input."
import codecs
import itertools

import pytest
import torch

from adaptive_lab import sampling
from adaptive_lab.controller.model import AdaptiveTransformer, Gates
from adaptive_lab.knobs import KnobError
from adaptive_lab.sampling import Sampling, at_rest, draw, generate, probabilities, readable, stream, truncated

ROW = torch.zeros(1, 1, dtype=torch.int64)


def made(context=8, seed=0, **how):
    torch.manual_seed(seed)
    m = AdaptiveTransformer(num_layers=2, num_heads=2, dim=16, context=context, **how)
    with torch.no_grad():
        m.logits.weight.mul_(4)  # far from uniform, so that a wrong place or byte before changes what is drawn
    return m


def uncached(model, seed, length, how=Sampling(), generator=None, **given):
    "Each byte from a whole forward over its window: the last bytes, `context` at most, else half of it."
    text, span, generator = list(seed or b"\n"), len(seed or b"\n"), generator or torch.Generator().manual_seed(0)
    for _ in range(length):
        if span > model.context:
            span = max(1, model.context // 2)
        with at_rest(model):
            logits = model(torch.tensor([text[-span:]]), **given)[:, -1]
        text.append(int(draw(probabilities(logits, how, torch.tensor([text])), generator)))
        span += 1
    return text[-length:]


# The rules


@pytest.mark.parametrize("top_k, top_p", [*itertools.product((0, 1, 7, 256), (1e-9, 0.5, 0.99, 1))])
def test_truncation_keeps_the_fewest_likeliest(top_k, top_p):
    p = (3 * torch.randn(50, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(-1)
    q = truncated(p, top_k, top_p)
    assert torch.allclose(q.sum(-1), torch.ones(50, dtype=torch.float64), atol=1e-12)
    for before, after in zip(p, q):
        kept = after > 0
        assert kept.any() and (kept.all() or before[kept].min() >= before[~kept].max())
        assert torch.allclose(after[kept] / after[kept].sum(), before[kept] / before[kept].sum())
        assert not top_k or kept.sum() <= top_k
        best = before.sort(descending=True).values[: top_k or 256]
        mass, n = best.cumsum(0) / best.sum(), int(kept.sum())
        assert top_p == 1 or (mass[n - 1] >= top_p - 1e-12 and (n == 1 or mass[n - 2] < top_p + 1e-12))


def test_among_equals_the_first_bytes_are_kept():
    p = torch.full((1, 256), 1 / 256, dtype=torch.float64)
    assert truncated(p, top_k=3)[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(torch.zeros(1, 256), Sampling(temperature=0), ROW).argmax() == 0


@pytest.mark.parametrize("temperature", (0, 1e-300, 1e-3))
def test_no_temperature_overflows(temperature):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 1e20
    p = probabilities(x, Sampling(temperature=temperature), ROW.expand(4, 1))
    assert torch.equal(p.argmax(-1), x.argmax(-1)) and torch.allclose(p.sum(-1), torch.ones(4, dtype=torch.float64))


def test_the_penalty_makes_recent_bytes_less_likely_and_looks_back_no_further_than_its_window():
    x, recent = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3, 4]])
    free, held = (probabilities(x, Sampling(repetition_penalty=t, window=2), recent)[0] for t in (1, 2))
    ratio = held / free
    assert (ratio[[3, 4]] < ratio[[0, 1, 2, 5]].min()).all() and torch.allclose(ratio[[0, 1, 2]], ratio[5].expand(3))


@pytest.mark.parametrize("u", (0.0, 1 - 2**-53))
def test_what_has_no_probability_is_never_drawn(monkeypatch, u):
    p = torch.zeros(1, 256, dtype=torch.float64)
    p[0, [7, 9, 200]] = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    monkeypatch.setattr(sampling.torch, "rand", lambda *shape, **how: torch.full(shape, u, dtype=torch.float64))
    assert draw(p, torch.Generator()).item() == (7 if u == 0 else 200)


# Generation


@pytest.mark.parametrize("context, seed", [*itertools.product((1, 2, 5, 8), (b"", b"a", b"abcde", bytes(range(40))))])
def test_the_cache_changes_no_byte(context, seed):
    model = made(context)
    for how in (Sampling(), Sampling(temperature=0), Sampling(top_k=20, repetition_penalty=1.5, window=3)):
        assert list(stream(model, seed, 30, how)) == uncached(model, seed, 30, how)


def test_the_cache_changes_no_byte_of_a_pruned_model():
    model = made()
    for part in ((0, 0), (0, 1), (0, "ffn"), (1, 1)):
        model.set_gate(*part, 0)
    model.prune()
    assert list(stream(model, b"abc", 30)) == uncached(model, b"abc", 30)


def test_rows_have_their_own_gates():
    model, seeds = made(), torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(0))
    heads = torch.tensor([[[1, 1], [1, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0.5]]]).float()
    greedy, ones = Sampling(temperature=0), torch.ones(3, 2)
    rows = generate(model, seeds, 20, greedy, gates=Gates(heads, ones, ones))
    for seed, row, h in zip(seeds, rows.tolist(), heads):
        assert row == uncached(model, seed.tolist(), 20, greedy, gates=Gates(h, ones[0], ones[0]))
    assert len({tuple(r) for r in generate(model, seeds[:1].expand(3, -1), 20, greedy, gates=Gates(heads, ones, ones)).tolist()}) == 3


def test_the_same_generator_gives_the_same_bytes_and_the_global_one_is_left_alone():
    model, state = made(dropout=0.5), torch.get_rng_state()
    first = list(stream(model, "é", 40))
    assert first == list(stream(model, "é".encode(), 40, generator=torch.Generator().manual_seed(0)))
    assert first == generate(model, ["é".encode()], 40)[0].tolist() != list(stream(model, "é", 40, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_a_stream_has_no_end_and_can_be_left():
    assert len(list(itertools.islice(stream(made(), b"a"), 100))) == 100


def test_knobs_act_from_the_next_byte_on():
    model, how = made(), Sampling(temperature=0)
    bytes_ = stream(model, b"abc", None, how)
    begun = [next(bytes_) for _ in range(3)]
    assert begun == uncached(model, b"abc", 3, how)
    how.temperature = 100
    assert len({next(bytes_) for _ in range(60)}) > 30


def test_gates_act_from_the_next_byte_on():
    same, shut = made(), made()
    a, b = (stream(m, b"abc", None, Sampling(temperature=0)) for m in (same, shut))
    assert [next(a) for _ in range(3)] == [next(b) for _ in range(3)]
    shut.set_gate(0, "layer", 0), shut.set_gate(1, "layer", 0)
    assert [next(a) for _ in range(5)] != [next(b) for _ in range(5)]


def test_a_pruned_part_in_the_middle_of_a_stream():
    model, twin, how = made(), made(), Sampling(temperature=0)
    bytes_ = stream(model, b"abc", None, how)
    begun = [next(bytes_) for _ in range(2)]
    for m in (model, twin):
        m.set_gate(0, 1, 0), m.set_gate(1, 0, 0)
        m.prune()
    assert [next(bytes_) for _ in range(4)] == uncached(twin, b"abc" + bytes(begun), 4, how)
    model.regrow(0, 1), twin.regrow(0, 1)
    assert next(bytes_) in range(256)


def test_modes_come_back_between_two_bytes_and_after_an_error():
    model = made(dropout=0.5)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    for _ in stream(model, b"abc", 3):
        assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.logits.weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="not finite"):
        next(stream(model, b"abc", 3))
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


# Text


def test_pieces_of_text_are_the_text_of_all_bytes():
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        data = bytes(torch.randint(0, 256, (30,), generator=rng).tolist()) + "aé€𝄞\n\t".encode()
        pieces = list(readable(data))
        assert "".join(pieces) == data.decode("utf-8", "replace").translate(sampling.HARMLESS) and all(pieces)
    assert list(readable("é€𝄞".encode())) == ["é", "€", "𝄞"]


def test_no_control_character_reaches_a_terminal():
    text = "".join(readable("".join(map(chr, range(300))).encode()))
    assert [c for c in text if codecs.encode(c, "unicode_escape").startswith((b"\\x0", b"\\x1", b"\\x7f", b"\\x8", b"\\x9"))] == []
    assert "\n" in text and "\t" in text and "\x1b" not in text and "\r" not in text


# Bad input


@pytest.mark.parametrize("knob", (dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_k=257), dict(top_k=1.5), dict(top_p=0), dict(top_p=1.01), dict(repetition_penalty=0.9), dict(window=0)))
def test_knobs_outside_their_range(knob):
    with pytest.raises(KnobError, match=f"{next(iter(knob))}=.* is not allowed"):
        Sampling(**knob)


@pytest.mark.parametrize(
    "call, word",
    (
        (lambda m: stream(m, b"a", 0), "length=0"),
        (lambda m: stream(m, b"a", True), "length=True"),
        (lambda m: stream(m, b"a", 2.5), "length=2.5"),
        (lambda m: stream(m, 5), "a text is a int"),
        (lambda m: stream(m, [1, 2]), "a text is a list"),
        (lambda m: generate(m, b"abc", 3), "a text is a int"),
        (lambda m: generate(m, [], 3), "texts of no bytes"),
        (lambda m: generate(m, [b"a", b"bc"], 3), "equal length"),
        (lambda m: generate(m, torch.zeros(2, 3), 3), "whole numbers"),
        (lambda m: generate(m, torch.zeros(0, 3, dtype=torch.int64), 3), "n at least 1"),
        (lambda m: generate(m, torch.zeros(3, dtype=torch.int64), 3), r"shape \(3,\)"),
        (lambda m: generate(m, torch.tensor([[-1, 4]]), 3), "from -1 to 4"),
    ),
)
def test_arguments_are_refused_at_once(call, word):
    with pytest.raises(ValueError, match=word):
        call(made())
