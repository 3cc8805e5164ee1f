"Generation by the byte model: the compiled step and recomputation, choosing, valid text, checkpoints, the command."
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lab import generating, sampling
from adaptive_lab.bytropix import generation, stepper as stepping
from adaptive_lab.bytropix.config import ByteModelConfig
from adaptive_lab.bytropix.generation import continued, draw, find_checkpoint, generate_text, load_model, probabilities
from adaptive_lab.bytropix.model import ByteModel
from adaptive_lab.bytropix.patching import EntropyTable, FixedStride, Whitespace
from adaptive_lab.bytropix.stepper import PlainStepper, Stepper, unfit
from adaptive_lab.data.text import stdlib_bytes
from adaptive_lab.sampling import Sampling, at_rest
from adaptive_lab.store import Store, StoreError
from adaptive_lab.wubu.ablations import PlainLevels
from adaptive_lab.wubu.landmarks import Flat
from adaptive_lab.wubu.levels import WuBuLevels

TEXT = stdlib_bytes(8_000)
SMALL = dict(local_hidden_size=24, decoder_memory_dim=20, context_window=48, hyperbolic_dims=[8, 4, 4], num_encoder_layers=1, num_decoder_layers=2, num_encoder_heads=2, num_decoder_heads=3, n_gram_sizes=[2, 3], n_gram_vocab_size=500, experts=["o0", "o1", "o3", "w0", "w1", "r2"])
RULES = dict(babylon=EntropyTable.default(), strides=FixedStride(2.5), words=Whitespace(9), never=FixedStride(1000))


def made(seed=0, rule="babylon", fitted=True, levels=None, **config):
    "A model with weights far from their beginnings, so that a wrong part shows."
    torch.manual_seed(seed)
    c = ByteModelConfig(**SMALL | config)
    model = ByteModel(c, RULES[rule], levels(c) if levels else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape))
    if fitted and model.experts:
        model.experts.fit(TEXT)
    return model.eval()


def differs(steps, model, data, first=1):
    "Greatest difference of the logits behind each prefix to the whole window's, relative to the greatest logit."
    with at_rest(model):
        whole = model(torch.tensor([list(data)]))[0].double().numpy()
    seen = [steps.begin(data[:first]), *(steps.push(data[i : i + 1]) for i in range(first, len(data)))]
    return np.abs(np.stack(seen) - whole[first - 1 :]).max() / np.abs(whole).max()


def recomputed(model, seed, length, how, generator):
    "Each byte from a whole forward pass over its window."
    text, span = list(seed or b"\n"), len(seed or b"\n")
    for _ in range(length):
        span = span if span <= model.context else max(1, model.context // 2)
        with at_rest(model):
            logits = model(torch.tensor([text[-span:]]))[:, -1]
        text.append(sampling.draw(sampling.probabilities(logits, how, torch.tensor([text])), generator).item())
        span += 1
    return text[-length:]


compiled = pytest.mark.skipif(bool(unfit(made())), reason="no C compiler")

# The compiled step

CASES = {
    "as it is": {},
    "no layer before patches": dict(num_encoder_layers=0),
    "two before, one behind": dict(num_encoder_layers=2, num_decoder_layers=1),
    "three behind": dict(num_decoder_layers=3),
    "no n-grams": dict(n_gram_sizes=[]),
    "long n-grams": dict(n_gram_sizes=[1, 9], n_gram_vocab_size=7),
    "no experts": dict(experts=[]),
    "experts not fitted": dict(fitted=False),
    "many experts": dict(experts=["o0", "o1", "o2", "o4", "o6", "w0", "w1", "w2", "r1", "r4"]),
    "flat head": dict(no_hierarchical_decoder=True),
    "strides": dict(rule="strides"),
    "words": dict(rule="words"),
    "never a patch": dict(rule="never"),
    "near blocks": dict(attention_span=11),
    "blocks of one byte": dict(attention_span=1, rule="strides"),
    "one level": dict(num_levels=1, hyperbolic_dims=[6]),
    "other levels": dict(rotation_types=["quat", "identity"], transform_types=["linear", "quat"], relative_vector_aggregation="sum"),
    "levels without kernel": dict(levels=lambda c: WuBuLevels(c, c.local_hidden_size, Flat)),
    "no levels": dict(levels=lambda c: PlainLevels(c.hyperbolic_dims, c.local_hidden_size, 5)),
    "wide": dict(local_hidden_size=72, num_encoder_heads=1, num_decoder_heads=9, decoder_memory_dim=130),
    "one head of one": dict(local_hidden_size=1, num_encoder_heads=1, num_decoder_heads=1),
}


@compiled
@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=CASES)
def test_a_step_gives_what_the_whole_window_gives(number, case):
    model, data = made(number, **CASES[case]), bytes(TEXT[100 * number : 100 * number + 48])
    assert differs(Stepper(model), model, data) < 2e-5
    assert differs(Stepper(model), model, data, 37) < 2e-5


@compiled
@settings(max_examples=10, deadline=None)
@given(st.one_of(st.binary(min_size=1, max_size=48), st.text("é東😀a ", min_size=12, max_size=12).map(str.encode)), st.lists(st.integers(1, 20), max_size=6), st.sampled_from(["babylon", "strides", "words"]))
def test_any_bytes_in_any_pieces(data, pieces, rule):
    model = MODELS.setdefault(rule, made(7, rule))
    s, at = Stepper(model), 0
    with at_rest(model):
        whole = model(torch.tensor([list(data)]))[0].numpy()
    for n in [*pieces, 48]:
        piece = data[at : at + n]
        if piece:
            logits = s.begin(piece) if at == 0 else s.push(piece)
            at += len(piece)
            assert np.abs(logits - whole[at - 1]).max() < 2e-5 * np.abs(whole).max()
    assert s.length == len(data)


MODELS = {}


@compiled
def test_a_window_begun_anew_knows_nothing_of_the_one_before():
    for span, rule, before in ((0, "babylon", bytes(TEXT[:48])), (11, "strides", bytes(TEXT[:32])), (0, "strides", "東京😀".encode()[:-1])):
        model, data = made(rule=rule, attention_span=span), bytes(TEXT[:20])
        used, fresh = Stepper(model), Stepper(model)
        used.begin(before)
        for i in range(20):
            assert np.array_equal(*(s.push(data[i : i + 1]) if i else s.begin(data[:1]) for s in (used, fresh)))


def test_the_plain_stepper_too():
    model = made(3)
    assert differs(PlainStepper(model), model, bytes(TEXT[:48]), 5) < 1e-5
    double = made(3, experts=[]).double()
    assert "float64" in unfit(double) and isinstance(stepping.stepper(double), PlainStepper)
    assert differs(PlainStepper(double), double, bytes(TEXT[:20])) < 1e-12


@compiled
def test_changed_weights_are_noticed():
    changes = {
        "an optimizer's step": lambda m: torch._foreach_add_([p.detach() for p in m.parameters()], 0.1),
        "one weight": lambda m: torch.nn.init.zeros_(m.head.out.bias),
        "another state": lambda m: m.load_state_dict(made(9).state_dict()),
        "a level that is turned": lambda m: m.levels.set_scale(1, 2.0),
        "other counts": lambda m: m.experts.fit(TEXT[:500]),
        "another rule": lambda m: m.patches.load_state_dict(made(rule="words").patches.state_dict()),
    }
    for name, change in changes.items():
        model = made()
        kinds = Stepper(model), PlainStepper(model)
        assert all(s.current() for s in kinds)
        change(model)
        assert not any(s.current() for s in kinds), name
        assert differs(Stepper(model), model, bytes(TEXT[:40])) < 2e-5, name


@compiled
def test_bad_bytes_are_refused_and_nothing_is_read():
    model = made()
    for s in (Stepper(model), PlainStepper(model)):
        before = s.begin(bytes(TEXT[:20]))
        for bad, word in ((b"", "one byte"), ("a", "str"), (bytes(29), "room for 28")):
            with pytest.raises(ValueError, match=word):
                s.push(bad)
        assert s.length == 20 and np.array_equal(s.begin(bytes(TEXT[:20])), before)
    with pytest.raises(ValueError, match="float64"):
        Stepper(made().double())


@compiled
def test_what_levels_raise_comes_out():
    class Failing(PlainLevels):
        def forward(self, x):
            raise ArithmeticError("no levels today")

    model = made(rule="strides", levels=lambda c: Failing(c.hyperbolic_dims, c.local_hidden_size, 5))
    s = Stepper(model)
    s.begin(b"a")
    with pytest.raises(ArithmeticError, match="no levels today"):
        s.push(b"bcdef")
    assert s.length == 0


# Choosing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 0.1, 0.75, 1, 5]), st.sampled_from([0, 1, 2, 40, 255, 256]), st.sampled_from([1e-9, 0.3, 0.9, 1.0]), st.sampled_from([1, 1.15, 4]), st.sampled_from([1, 5, 64]))
def test_bytes_are_chosen_as_sampling_does(seed, temperature, top_k, top_p, penalty, window):
    rng = np.random.default_rng(seed)
    x, recent = rng.normal(0, rng.choice([0.01, 3, 50]), 256).round(rng.integers(0, 3)).astype(np.float32), bytes(rng.integers(0, 256, rng.integers(1, 80)).tolist())
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, window=window)
    ours, theirs = probabilities(x, how, recent), sampling.probabilities(torch.from_numpy(x)[None], how, torch.tensor([list(recent)]))
    assert np.abs(ours - theirs[0].numpy()).max() < 1e-13 and abs(ours.sum() - 1) < 1e-12
    luck = [torch.Generator().manual_seed(seed) for _ in range(2)]
    assert [draw(ours, luck[0]) for _ in range(8)] == [sampling.draw(theirs, luck[1]).item() for _ in range(8)]
    assert torch.equal(luck[0].get_state(), luck[1].get_state())


def test_what_has_no_probability_is_never_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(*size, dtype=torch.float64))
    assert draw(np.array([0, 0, 0.5, 0.5]), torch.Generator()) == 2


def test_logits_that_are_not_finite_are_refused():
    model = made()
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("nan")
    for way in (continued, sampling.stream):
        with pytest.raises(ArithmeticError, match="not finite"):
            next(way(model, b"a"))


# Streams of bytes: cached generation is recomputation


@pytest.mark.parametrize("case, native", [("as it is", True), ("flat head", True), ("strides", True), ("near blocks", True), ("no levels", True), ("as it is", False)])
def test_generation_is_recomputation(case, native, monkeypatch):
    if not native:
        monkeypatch.setattr(stepping, "unfit", lambda model: "switched off in a test")
    model = made(5, context_window=25, **CASES[case])
    ways = (Sampling(temperature=0), Sampling(temperature=0.75, top_k=40, repetition_penalty=1.15, window=8), Sampling(top_p=0.9))
    for seed, how in list(enumerate(ways))[0 if native and case == "as it is" else 1 :]:
        start = [b"", bytes(TEXT[:24]), bytes(TEXT[300:380])][seed]  # nothing, nearly a window, more than one
        luck = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert list(continued(model, start, 27, how, luck[0])) == recomputed(model, start, 27, how, luck[1])


def test_a_stream_is_that_of_sampling_and_touches_no_other_luck():
    model, how = made(6, context_window=20), Sampling(temperature=1.2, top_k=30, repetition_penalty=2, window=8)
    state, training = torch.get_rng_state(), model.train().training
    ours = bytes(continued(model, "naïve ", 80, how, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state) and model.training == training and all(m.training for m in model.modules())
    assert ours == bytes(sampling.stream(model, "naïve ", 80, how, torch.Generator().manual_seed(1)))


def test_a_change_between_two_bytes_acts_from_the_next_byte_on():
    model, how = made(8), Sampling(temperature=0)
    s = continued(model, b"import ", None, how)
    text = [*b"import ", *itertools.islice(s, 5)]
    with torch.no_grad():
        model.head.out.weight.neg_()
        model.trust.weight.zero_(), model.trust.bias.zero_()
    for _ in range(5):
        with at_rest(model):
            expected = model(torch.tensor([text]))[0, -1].argmax().item()
        text.append(next(s))
        assert text[-1] == expected
    how.temperature = 100.0  # knobs, too, are read anew
    assert len({next(s) for _ in range(30)}) > 15


def test_arguments_are_refused_before_the_first_byte():
    model = made()
    for bad in (dict(max_length=0), dict(max_length=2.0), dict(top_k=-1), dict(top_p=0), dict(temperature=-1), dict(repetition_penalty=0.5), dict(seed_text=5)):
        with pytest.raises(ValueError):
            generate_text(model, **bad)


# Text


@pytest.mark.parametrize("seed_text", ["", "é", b"\xe2\x82", "東京 😀"])
def test_text_is_valid_and_harmless(seed_text):
    model = made(2, experts=[])
    with torch.no_grad():
        model.head.out.bias[:8].sub_(2.0)  # high nibbles from 8 on: mostly bytes that are no ASCII
    for seed in range(3):
        pieces = list(generate_text(model, seed_text, 150, 3.0, 1, 0, 1.0, seed))
        text = "".join(pieces)
        assert text.encode().decode() == text and all(pieces) and "�" in text
        assert not [c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0"]
    assert pieces == list(generate_text(model, seed_text, 150, 3.0, 1, 0, 1.0, 2)) != list(generate_text(model, seed_text, 150, 3.0, 1, 0, 1.0, 3))


def test_a_character_comes_when_it_is_whole(monkeypatch):
    told = []
    monkeypatch.setattr(generation, "continued", lambda *a, **k: (told.append(b) or b for b in "a€\n".encode() + b"\xe2\x82"))
    pieces = generate_text(made())
    assert [(next(pieces), len(told)) for _ in range(3)] == [("a", 1), ("€", 4), ("\n", 5)]
    assert list(pieces) == ["�"]


# Checkpoints


def saved(folder, run, step, weights, **recipe):
    names = {f"model.{k}": v for k, v in SMALL.items()} | {"model.curvatures": "", "data.path": "gone.txt", "model.mean_patch": 4.5}
    recipe = dict(format=1, data="text", model="byte_model", optimizer="adamw", knobs=names) | recipe
    return Store(folder).save(run, step, dict(model=weights.state_dict(), position={}), recipe=recipe)


def test_a_model_comes_back_from_each_form_of_path(tmp_path):
    models = {("a", 5): made(1), ("b", 7): made(2, rule="words"), ("a", 9): made(3), ("a", 2): made(4)}
    for (run, step), model in models.items():
        saved(tmp_path, run, step, model)
    forms = {"": ("a", 2), "a": ("a", 2), "b": ("b", 7), "a@5": ("a", 5), "a@9": ("a", 9), "b@0007": ("b", 7)}
    for form, key in forms.items():
        store, found = find_checkpoint(tmp_path / form)
        assert (found.run, found.step) == key, form
        state, loaded = torch.get_rng_state(), load_model(str(tmp_path / form))
        x = torch.tensor([list(bytes(TEXT[:48]))])
        assert torch.equal(loaded(x), models[key](x)) and not loaded.training and torch.equal(torch.get_rng_state(), state)
        assert list(generate_text(loaded, "de", 30)) == list(generate_text(models[key], "de", 30))


def test_what_is_no_checkpoint_is_refused_with_what_there_is(tmp_path):
    store = tmp_path / "runs"
    saved(store, "a", 5, made())
    saved(store, "net", 1, made(), model="mlp")
    saved(store, "odd", 1, made(), knobs={"model.local_hidden_size": 24})
    saved(store, "new", 1, made(), format=99)
    (tmp_path / "empty" / "records").mkdir(parents=True)
    wrong = {"nowhere": "not a checkpoint", "runs/c": "there is a, net", "runs/a@6": "there is @5", "runs/a@x": "the step", "runs/a@": "the step", "runs/net": "model 'mlp'", "runs/odd": "does not fit", "runs/new": "newer", "empty": "no checkpoint yet", "runs/a/b": "not a checkpoint"}
    for path, word in wrong.items():
        with pytest.raises((StoreError, ValueError), match=word):
            load_model(tmp_path / path)


# The command


def test_the_command_prints_the_seed_text_and_what_follows(tmp_path, capfd):
    model = made(11)
    saved(tmp_path, "r", 3, model)
    assert generating.generate_command(["--checkpoint_path", str(tmp_path / "r"), "--seed_text", "été ", "--max_length", "40", "--seed", "4"]) == 0
    out = capfd.readouterr().out
    assert out == "été " + "".join(generate_text(model, "été ", 40, seed=4)) + "\n"
    assert generating.generate_command(["--checkpoint_path", str(tmp_path), "--max_length", "20", "--temperature", "1.5", "--repetition_penalty", "1", "--top_k", "0", "--top_p", "0.8"]) == 0
    assert capfd.readouterr().out == "".join(generate_text(model, "", 20, 1.5, 1.0, 0, 0.8)) + "\n"


def test_the_command_refuses_and_stops(tmp_path, capfd, monkeypatch):
    saved(tmp_path, "r", 3, made(11))
    path = ["--checkpoint_path", str(tmp_path)]
    for argv in ([], [*path, "--max_length", "x"], [*path, "--unknown"]):
        with pytest.raises(SystemExit) as stop:
            generating.generate_command(argv)
        assert stop.value.code == 2
    with pytest.raises(ValueError, match="top_k"):
        generating.generate_command([*path, "--top_k", "300"])

    def stops(*given, **more):
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_text", stops)
    assert generating.generate_command(path) == 130
    assert capfd.readouterr().out.endswith("a\n")
