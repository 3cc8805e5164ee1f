"Diversity: what is valid, how words are written and counted, that the level is kept, and what each method changes."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lab.data.streams import DataError
from adaptive_lab.diversity import (
    COLDEST, DRAWS, END, GRIDS, LETTERS, LONGEST, START, Diversity, Speller, codes, counted, drawn, gumbel, lexicon, measure, read_recipe, rows_of, run, scored,
    split, word_losses, written,
)
from adaptive_lab.knobs import KnobError

SMALL = dict(hidden=16, steps=30, asked=200)
WORDS = st.lists(st.text("abcxyz", min_size=1, max_size=LONGEST), min_size=1, max_size=30, unique=True)


@pytest.fixture
def text(tmp_path):
    "A file in which aaa is said a hundred times as often as each of 150 others."
    letters = "abcdef"
    others = sorted({letters[i % 6] * 2 + letters[i // 6 % 6] + letters[i // 36 % 6] for i in range(1, 151)})
    path = tmp_path / "text.txt"
    path.write_text(" ".join(["aaa", *others] + ["aaa"] * 99))
    return str(path)


@given(WORDS)
@settings(max_examples=30, deadline=None)
def test_words_have_codes_of_their_own(words):
    assert len(np.unique(codes(words))) == len(words) and codes(words).min() > 0


@given(WORDS, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_rows_spell_the_words(words, context):
    seen, said = rows_of(words, context)
    assert seen.shape == (len(words), LONGEST + 1, context)
    for w, x, y in zip(words, seen.tolist(), said.tolist()):
        assert y == [*(ord(c) - 96 for c in w), END] + [-100] * (LONGEST - len(w))
        assert all(x[i + 1][-1] == y[i] for i in range(len(w) - 1)) and x[0] == [START] * context


def test_writing_is_sampling_letter_by_letter():
    net, noise = Speller(Diversity(hidden=16), 0), gumbel(50, 0, "test")
    net[-1].bias.data[[START, END]] += 1.5  # so that the start is likely, and most words end
    found = written(net, 7, 0.7, noise)
    assert (found > 0).sum() > 30
    for w in range(50):
        c, letters = [START] * 7, []
        for place in range(LONGEST + 1):
            logits = net(torch.tensor([c[-7:]]))[0] / 0.7 + noise[place, w]
            logits[START] = -math.inf
            letters.append(int(logits.argmax()))
            c.append(letters[-1])
            if letters[-1] == END:
                break
        code = sum(letter * LETTERS ** (LONGEST - i) for i, letter in enumerate(letters)) if letters[-1] == END else -1
        assert found[w] == code


def test_gumbel_noise_makes_softmax_samples():
    logits = torch.linspace(-2, 1, LETTERS)
    drawn = torch.bincount((logits + gumbel(20_000, 0, "test")[0]).argmax(1), minlength=LETTERS) / 20_000
    assert (drawn - logits.softmax(0)).abs().max() < 0.01


def test_the_level_is_kept_and_words_are_counted_once(text):
    net, _, lex = run({"path": text, "steps": 300, "hidden": 32}, 0)
    knobs = Diversity(path=text, level=0.5)
    found = scored(net, knobs, lex, 0)
    assert abs(found["valid"] - 50) < 4 and found["temperature"] > COLDEST * 1.1
    w = [written(net, 7, found["temperature"], gumbel(2000, 0, f"draw {d}")) for d in range(DRAWS)]
    by_hand = np.mean([len(set(x.tolist()) & set(lex.valid.tolist())) for x in w])
    new = np.mean([len(set(x.tolist()) & set(lex.held.tolist())) for x in w])
    assert math.isclose(found["distinct"], by_hand) and math.isclose(found["new"], new) and 0 < new < by_hand <= len(lex.valid)


def test_a_validation_never_sees_the_words_of_the_test(text):
    whole, part = lexicon(text, 0.2, 7, "test", 5), lexicon(text, 0.2, 7, "validation", 5)
    assert not set(whole.held.tolist()) & set(part.valid.tolist()) and not set(part.held.tolist()) & {*codes_seen(part)}
    assert set(part.valid.tolist()) == {*codes_seen(whole)}


def codes_seen(lex):
    return (lex.said.clamp(min=0) * torch.tensor([LETTERS ** (LONGEST - i) for i in range(LONGEST + 1)])).sum(1).tolist()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_words_are_drawn_by_a_power_of_their_counts(power):
    counts = np.array([1000, 100, 10, 1])
    rows = drawn(counts, Diversity(power=power, steps=1000), 0)
    assert rows.shape == (1000, 64) and torch.equal(rows, drawn(counts, Diversity(power=power, steps=1000), 0))
    assert np.allclose(np.bincount(rows.flatten(), minlength=4) / 64_000, counts**power / (counts**power).sum(), atol=0.01)


def test_frequent_words_are_skipped_by_the_rule_of_word2vec():
    counts = np.array([6000, 3000, 900, 90, 10])
    f = counts / counts.sum()
    want = np.array([math.sqrt(0.1 * x) if x > 0.1 else x for x in f])
    seen = np.bincount(drawn(counts, Diversity(threshold=0.1, steps=2000), 0).flatten(), minlength=5) / 128_000
    assert np.allclose(seen, want / want.sum(), atol=0.01)


def test_the_words_of_a_text_are_counted(text):
    words, counts = counted(text)
    assert counts[words.index("aaa")] == 100 and set(counts.tolist()) == {1, 100}
    kept, n, out = split(list(words), counts, 0.2, 0)
    assert all(c == (100 if w == "aaa" else 1) for w, c in zip(kept, n)) and len(out) == round(0.2 * len(words))


def test_values_fall_where_words_are_well_spelt():
    _, wrapper, lex = run({**GRIDS["ours: words by loss"][0], "hidden": 32, "steps": 300}, 0)
    phi, seen = wrapper.phi_values()["samples"], torch.from_numpy(np.argsort(-lex.counts)[:20].copy())
    others = torch.from_numpy(((lex.counts > 3) & (lex.counts < 50)).nonzero()[0])
    assert phi[seen].mean() < 0.9 * phi[others].mean()


def test_values_by_rarity_follow_the_counts():
    _, wrapper, lex = run({**GRIDS["ours: words by rarity"][0], "alpha": 0.3, "hidden": 16, "steps": 200}, 0)
    phi, top = wrapper.phi_values()["samples"], np.argsort(-lex.counts)[:10].copy()
    assert phi[top].max() < 1 < phi.max() or phi[top].mean() < phi[phi != 1].mean() / 2


def test_losses_by_hand():
    logits, y = torch.randn(6, LETTERS, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4, 5, 6])
    own = torch.tensor([0, 0, 0, 0, 1, 1])
    l = -logits.double().log_softmax(1)[range(6), y].float()
    plain, mean = word_losses(logits, y, own, 2, Diversity())
    assert torch.allclose(plain, torch.stack([l[:4].sum(), l[4:].sum()]) / 3) and torch.allclose(plain.mean(), l.mean())
    assert torch.allclose(mean, torch.stack([l[:4].mean(), l[4:].mean()]))
    focal = word_losses(logits, y, own, 2, Diversity(gamma=2.0))[0]
    assert torch.allclose(focal.mean(), (l * (1 - (-l).exp()) ** 2).mean())
    smooth = word_losses(logits, y, own, 2, Diversity(smoothing=0.1))[0]
    assert torch.allclose(smooth.mean(), 0.9 * l.mean() - 0.1 * logits.log_softmax(1).mean(), atol=1e-6)


@pytest.mark.parametrize("row", GRIDS)
def test_every_row_repeats(row):
    one = measure({**GRIDS[row][0], **SMALL}, 3)
    assert one == measure({**GRIDS[row][0], **SMALL}, 3) and all(math.isfinite(v) for v in one.values())


@pytest.mark.parametrize("wrong, word", [
    ({"alpha": 0.1}, "without values"), ({"values": "rarity", "granularity": "unit"}, "rarity"), ({"values": "loss", "granularity": "feature"}, "feature"), ({"step": 1}, "step"),
])
def test_what_would_be_ignored_is_refused(wrong, word):
    with pytest.raises(KnobError, match=word):
        read_recipe(wrong)


def test_a_text_of_few_words_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one two three four " * 50)
    with pytest.raises(DataError, match="4 different words"):
        measure({"path": str(path)}, 0)
