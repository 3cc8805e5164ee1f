"Patches: lossless, causal, whole characters, one rule in all its forms. Hashes: of the last n bytes, spread as chance would."
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lab.bytropix.hashing import FIRST, GOLDEN, SECOND, mixed, ngram_hashes
from adaptive_lab.bytropix.patching import END, EntropyTable, FixedStride, Patcher, Rule, Whitespace, babylon_patches, followers, next_character, patch_ends, patch_ids, utf8_flags

BEGINNINGS = [c.encode()[:k] for c in "é߿ࠀ€퟿\uffffЖ😀\U00040000\U0010ffff" for k in (1, 2, 3)]
WRONG = [b"\xc0\x80", b"\xc1", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5", b"\xff", b"\x80", b"\xbf"]
piece = st.one_of(st.binary(max_size=3), st.text(max_size=4).map(str.encode), st.sampled_from([*BEGINNINGS, *WRONG]), st.sampled_from("  \n\0aetho").map(str.encode))
any_bytes = st.lists(piece, max_size=40).map(b"".join)
RANDOM = Rule("random", np.random.default_rng(0).random((256, 256)) < 0.2, 7.3)
RULES = [EntropyTable.default(), FixedStride(1), FixedStride(4.5), Whitespace(5), Whitespace(), RANDOM, Rule("all", np.ones((256, 256)), 5)]
rule = st.sampled_from(RULES)
many = settings(max_examples=150, deadline=None)


def is_open(data):
    "Do these bytes end with the beginning of a valid character? By Python's incremental decoder, which keeps it back."
    for k in (1, 2, 3):
        tail = data[-k:]
        if len(tail) == k and tail[0] >= 0xC2:
            try:
                tail.decode()
            except UnicodeDecodeError as e:
                if e.reason == "unexpected end of data" and e.start == 0 and e.end == k:
                    return True
    return False


def twin(rule, data):
    "After how many bytes a patch ends: the rule in words, byte by byte, in whole numbers."
    found, cut, due = [], 0, False
    for n in range(1, len(data) + 1):
        passed = [k for k in range(16 * (n - 1 - cut) + 1, 16 * (n - cut) + 1) if k % rule.sixteenths == 0]
        due = due or bool(passed)
        if is_open(data[:n]):
            continue
        entropy = rule.code[(b"\n" + data)[n - 1] << 8 | data[n - 1]] & END
        if entropy or due:
            found.append(n)
        cut, due = n if entropy else cut, False
    return found


def starts(data):
    "Where characters begin; an invalid byte is one of its own."
    text = data.decode(errors="surrogateescape")
    return {0, *np.cumsum([len(c.encode(errors="surrogateescape")) for c in text]).tolist()}


@many
@given(any_bytes, rule, st.data())
def test_every_form_is_the_rule(data, rule, how):
    expected = twin(rule, data)
    pushed, fed = Patcher(rule), Patcher(rule)
    assert [n for n, b in enumerate(data, 1) if pushed.push(b)] == expected
    places = sorted(how.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    chunks = [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]
    assert np.concatenate([fed.feed(c, block=how.draw(st.integers(1, 30))) for c in chunks]).tolist() == expected
    assert pushed.__dict__ == fed.__dict__
    assert (rule.ends(torch.tensor([list(data)], dtype=torch.uint8))[0].nonzero().flatten() + 1).tolist() == expected


@many
@given(any_bytes, rule)
def test_patches_cover_and_leave_characters_whole(data, rule):
    patches = rule.patches(data)
    assert b"".join(data[a:b] for a, b in patches) == data and all(a < b for a, b in patches)
    assert {a for a, _ in patches} <= starts(data)


@many
@given(any_bytes, any_bytes, rule)
def test_patches_of_a_prefix_are_a_prefix(data, more, rule):
    before, after = rule.patches(data), rule.patches(data + more)
    assert before[:-1] == after[: max(0, len(before) - 1)]
    x = torch.tensor([list(data + more)], dtype=torch.uint8)
    assert torch.equal(rule.ends(x)[:, : len(data)], rule.ends(x[:, : len(data)]))


@many
@given(st.text(max_size=80), st.integers(4, 30))
def test_no_patch_of_text_is_longer_than_the_longest(text, longest):
    table = EntropyTable(np.zeros((256, 256)), 1, longest)
    assert all(b - a <= longest for a, b in table.patches(text.encode()))
    assert "".join(text.encode()[a:b].decode() for a, b in table.patches(text.encode())) == text


@many
@given(any_bytes, rule, st.slices(12), st.integers(-12, 12))
def test_patches_are_like_the_list_of_them(data, rule, some, i):
    patches = rule.patches(data)
    as_list = list(zip([0, *patches.ends.tolist()], patches.ends.tolist()))
    assert patches == as_list == list(patches) and as_list == patches == rule.patches(data) and len(patches) == len(as_list)
    assert patches[some] == as_list[some] and (patches == [*as_list, (0, 1)]) is False and patches != rule.patches(data + b"x") and patches != 3
    if -len(as_list) <= i < len(as_list):
        assert patches[i] == as_list[i] and patches[i] in patches and patches.index(patches[i]) == i % len(as_list)
        assert list(map(type, patches[i])) == [int, int]
    else:
        with pytest.raises(IndexError):
            patches[i]
    assert repr(rule.patches(b"")) == "[]" and (len(patches) > 20 or repr(patches) == repr(as_list))


def test_blocks_and_long_runs():
    draw = np.random.default_rng(1)
    runs = [bytes(draw.integers(0, 256, n, dtype=np.uint8)) for n in (70_000, 5)] + [b"a" * 70_001, "€😀".encode() * 30_000, b"\xc8" * 70_000, b" x"]
    data = b"".join(runs)
    for rule in RULES[:3]:
        one = Patcher(rule)
        assert Patcher(rule).feed(data).tolist() == [n for n, b in enumerate(data, 1) if one.push(b)]
        assert np.array_equal(Patcher(rule).feed(data, 1 << 12), Patcher(rule).feed(data, 1 << 20))


def test_flags_are_those_of_pythons_decoder():
    flags = utf8_flags()
    for a in range(256):
        for b in range(256):
            pair = bytes([a, b])
            assert bool(flags[a, b] & 2) == is_open(pair) and bool(flags[a, b] & 8) == (a >= 0xF0 and is_open(pair) and b < 0xC0)


def test_rows_are_independent_and_ids_count_finished_patches():
    x = torch.randint(0, 256, (5, 300), generator=torch.Generator().manual_seed(0))
    for rule in RULES:
        ends = rule.ends(x)
        assert ends.dtype == torch.bool and torch.equal(ends, torch.cat([rule.ends(r[None]) for r in x.to(torch.uint8)]))
        ids = patch_ids(ends)
        assert ids.tolist() == [[int(e[:t].sum()) for t in range(300)] for e in ends]
        assert rule.ends(x[:, :0]).shape == patch_ids(rule.ends(x[:, :0])).shape == (5, 0)
        assert rule.ends(x[:0]).shape == (0, 300)


def test_default_table_stays_what_it_is():
    table = EntropyTable.default()
    assert hashlib.sha256(table.code.tobytes()).hexdigest()[:16] == "79007fc634e1c130"  # models have learned with it
    text = b"The quality of mercy is not strained."
    assert "|".join(text[a:b].decode() for a, b in babylon_patches(text)) == "The |quali|ty |of |mercy |is |not |stra|ine|d."
    assert babylon_patches(b"") == [] and babylon_patches(bytes(50)) == [(0, 21), (21, 42), (42, 50)]
    assert patch_ends(text).dtype == np.int64 and patch_ends(text).tolist() == [b for _, b in babylon_patches(text)]


def probability(data, context):
    "p(next | context) by Witten and Bell, from a list of what followed."
    low = probability(data, context[1:]) if context else [1 / 256] * 256
    told, k = b"\n\n" + data, len(context)
    next_ones = [told[i + 2] for i in range(len(data)) if told[i + 2 - k : i + 2] == context]
    seen = len(set(next_ones))
    return np.array([(next_ones.count(c) + seen * low[c]) / (len(next_ones) + seen) for c in range(256)]) if next_ones else np.array(low)


@pytest.mark.parametrize("seed", range(3))
def test_entropies_are_those_of_the_definition(seed):
    draw = np.random.default_rng(seed)
    data = "".join(draw.choice(list("ab éèяж€₭😀😂"), 60)).encode()
    p = followers(data)
    H = -(p.astype(float) * np.log2(p)).sum(-1)

    def rest(a, b, missing):
        "Entropy of so many bytes that follow a, b."
        then = {1: lambda: 0, 2: lambda: p[a, b] @ H[b], 3: lambda: sum(p[a, b, c] * rest(b, c, 2) for c in range(256))}
        return H[a, b] + then[missing]()

    found = next_character(p)
    for a, b in [(97, 98), (0xC3, 0xA9), (0x82, 0xAC), (32, 97), (10, 10), (0, 255)]:
        assert np.allclose(p[a, b], probability(data, bytes([a, b])), rtol=1e-5)
        missing = [(0xC2, 0xE0, 1), (0xE0, 0xF0, 2), (0xF0, 0xF5, 3)]
        exact = H[a, b] + sum(p[a, b, c] * rest(b, c, k) for low, high, k in missing for c in range(low, high))
        assert abs(found[a, b] - exact) < 1e-3


def test_mean_patch_is_reached_and_the_table_is_packed():
    draw = np.random.default_rng(2)
    words = ["".join(map(chr, draw.integers(97, 123, draw.integers(1, 9)))) for _ in range(300)]
    data = " ".join(words[i] for i in draw.integers(0, 300, 20_000)).encode()
    for kind in (FixedStride, Whitespace, EntropyTable):
        for mean in (3, 4.5):
            rule = kind.fit(data, mean_patch=mean)
            assert abs(len(data) / len(rule.patch_ends(data)) - mean) < 0.1 and isinstance(rule, kind)
    again = EntropyTable.unpack(rule.pack())
    assert np.array_equal(again.code, rule.code) and (again.threshold, again.longest) == (rule.threshold, rule.longest)
    assert again.sixteenths == rule.sixteenths and np.array_equal(again.bits, rule.bits)
    assert EntropyTable.fit(data, 6, longest=64).longest == 64


@pytest.mark.parametrize("wrong, error, words", [
    (lambda: babylon_patches("text"), TypeError, "str"),
    (lambda: patch_ends(None), TypeError, "NoneType"),
    (lambda: FixedStride(0.5), ValueError, "stride=0.5"),
    (lambda: FixedStride(float("nan")), ValueError, "stride=nan"),
    (lambda: EntropyTable(np.zeros((256, 256)), 1, 3), ValueError, "longest=3"),
    (lambda: EntropyTable(np.zeros((256, 255)), 1), ValueError, r"\(256, 255\)"),
    (lambda: EntropyTable(np.full((256, 256), np.nan), 1), ValueError, "bits"),
    (lambda: EntropyTable(np.zeros((256, 256)), float("nan")), ValueError, "threshold=nan"),
    (lambda: Rule("r", np.zeros(7), 4), ValueError, r"\(7,\)"),
    (lambda: EntropyTable.fit(b"", 4.5), ValueError, "mean_patch=4.5"),
    (lambda: Whitespace.fit(b"ab cd " * 99, 100), ValueError, "whitespace can be fitted from 1.00"),
    (lambda: EntropyTable.unpack(b"nothing"), ValueError, "no packed table"),
    (lambda: EntropyTable.unpack(EntropyTable.default().pack()[:-5]), ValueError, "no packed table"),
    (lambda: Patcher(RANDOM).push(256), ValueError, "byte=256"),
    (lambda: RANDOM.ends(torch.zeros(3, dtype=torch.uint8)), ValueError, r"\(3,\)"),
    (lambda: RANDOM.ends(torch.zeros(2, 3)), ValueError, "float32"),
    (lambda: RANDOM.ends(torch.tensor([[1, 256]])), ValueError, "1 to 256"),
    (lambda: ngram_hashes(torch.zeros(2, 3), 3, 10), ValueError, "float32"),
    (lambda: ngram_hashes(torch.zeros(2, 3, dtype=torch.uint8), 0, 10), ValueError, "n=0"),
    (lambda: ngram_hashes(torch.zeros(2, 3, dtype=torch.uint8), 3, 0), ValueError, "size=0"),
])
def test_what_is_wrong_is_said(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()


@many
@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 2**31))
def test_a_hash_is_of_the_last_bytes_only(row, n, size):
    x = torch.tensor([row])
    found = ngram_hashes(x, n, size)
    assert found.dtype == torch.int64 and 0 <= found.min() and found.max() < size
    assert torch.equal(found, ngram_hashes(x.to(torch.uint8), n, size)) and torch.equal(found[0], ngram_hashes(x[0], n, size))
    if len(row) > n:
        assert torch.equal(found[:, -1], ngram_hashes(x[:, -n:], n, size)[:, -1])
    t = len(row) - 1
    h = (sum((row[t - i] + 1) * 257**i for i in range(n) if i <= t) + n * GOLDEN % 2**63) % 2**64
    for by, factor in ((30, FIRST), (27, SECOND)):
        h = (h ^ (h >> by)) * factor % 2**64
    assert found[0, -1].item() == ((h ^ (h >> 31)) >> 33) * size >> 31


@pytest.mark.parametrize("n, size", [(3, 30_000), (3, 2**14), (3, 17_576), (4, 100_003), (2, 1000)])
def test_buckets_fill_as_by_chance(n, size):
    letters = torch.cartesian_prod(*[torch.arange(97, 123)] * n)[:, None].reshape(-1, n)
    counts = torch.bincount(ngram_hashes(letters, n, size)[:, -1], minlength=size).double()
    load = len(letters) / size
    assert abs((counts > 0).double().mean() - (1 - (1 - 1 / size) ** len(letters))) < 5 * (load / size) ** 0.5 + 5 / size
    assert abs(counts.var() / load - 1) < 5 * (2 / size) ** 0.5 + 1 / len(letters) ** 0.5  # of a Poisson distribution


def test_mixing_loses_nothing():
    h = torch.arange(100_000)
    assert len(mixed(h).unique()) == len(h) and mixed(torch.tensor([GOLDEN])).item() % 2**64 == 0xE220A8397B1DCDAF
