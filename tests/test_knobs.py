"Every public knob: refused outside its range with name, value and range; has a slider and a flag; stands in the table."
import math

import pytest

from adaptive_lab import continual, reweighting
from adaptive_lab.cli import recipe_from_flags
from adaptive_lab.controller.adaptation import Adaptation
from adaptive_lab.controller.feedback import Timing, Worth
from adaptive_lab.controller.gates import Gating
from adaptive_lab.controller.meta import Meta
from adaptive_lab.controller.policies import A2CKnobs, PolicyKnobs, PPOKnobs
from adaptive_lab.controller.thumbs import Liking
from adaptive_lab.diversity import Diversity
from adaptive_lab.epsilon_vae.atlas import Charting
from adaptive_lab.epsilon_vae.curves import Bend
from adaptive_lab.epsilon_vae.function_space import Functions
from adaptive_lab.epsilon_vae.prediction import Prediction
from adaptive_lab.epsilon_vae.token_vae import TokenSizes
from adaptive_lab.epsilon_vae.vae import VAE
from adaptive_lab.knobs import KnobError, Knobs, table, walk
from adaptive_lab.panels.controls import control, is_list, meant
from adaptive_lab.parts import parts
from adaptive_lab.sampling import Sampling
from adaptive_lab.tape import RunKnobs
from adaptive_lab.training import Training
from adaptive_lab.transfer import Transfer
from adaptive_lab.wubu.embedding import Annealing
from adaptive_lab.zoo import Zoo

GROUPS = {("run", None): RunKnobs, ("training", None): Training}
GROUPS.update({(kind, name): p.knobs for kind in ("data", "model", "optimizer", "mechanism") for name, p in parts(kind).items()})
RIVALS = {("continual", None): continual.Protocol, ("reweighting", None): reweighting.Protocol, ("transfer", None): Transfer, ("diversity", None): Diversity, ("zoo", None): Zoo}
RIVALS.update({(cls.__module__.rpartition(".")[2], None): cls for cls in (Charting, Bend, Functions, Prediction, TokenSizes, VAE)})
RIVALS.update({(f"controller.{cls.__name__.lower()}", None): cls for cls in (Adaptation, Worth, Timing, Gating, Meta, PolicyKnobs, A2CKnobs, PPOKnobs, Liking)})
RIVALS["sampling", None] = Sampling
RIVALS["embedding", None] = Annealing
RIVALS.update({(kind, name): p.knobs for kind in ("learner", "weighting") for name, p in parts(kind).items()})  # of comparisons, not of a recipe
listed = lambda groups: [pytest.param(where, cls, k, id=f"{where[1] or where[0]}.{k.name}") for where, cls in groups.items() for k in walk(cls)]
KNOBS = listed(GROUPS | RIVALS)


def test_every_class_of_knobs_is_reachable():
    "A declaration that no part names would escape the walk below."
    def below(cls):
        return {cls, *(s for c in cls.__subclasses__() for s in below(c))}

    declared = {c for c in below(Knobs) if c.__module__.startswith("adaptive_lab.") and walk(c)}
    bases = {c for c in declared if c.__subclasses__()}
    assert declared - bases <= set(GROUPS.values()) | set(RIVALS.values())
    assert len(KNOBS) > 30


def outside(k):
    "Values that the declaration does not allow."
    if k.choices or k.type is bool or is_list(k):
        return ["no such choice"]
    if k.type is str:
        return [3.5]
    step = 1 if k.type is int else 1e-9
    found = [math.nan, "many"]
    if k.low is not None:
        found.append(k.low if k.low_open else k.low - step)
    if k.high is not None:
        found.append(k.high if k.high_open else k.high + max(step, abs(k.high) * 1e-9))
    return found


@pytest.mark.parametrize("where, cls, k", KNOBS)
def test_outside_the_range_is_refused_by_name_value_and_range(where, cls, k):
    for value in outside(k):
        with pytest.raises(KnobError) as e:
            cls(**{k.name: value})
        assert k.name in str(e.value) and repr(value) in str(e.value) and k.range in str(e.value)
        good = cls()
        with pytest.raises(KnobError):
            setattr(good, k.name, value)
        assert getattr(good, k.name) == k.default


@pytest.mark.parametrize("where, cls, k", KNOBS)
def test_slider(where, cls, k):
    made = control(k, k.default)
    assert made.description == k.name and k.doc in made.tooltip
    assert getattr(cls(**{k.name: meant(k, made.value)}), k.name) == k.default or k.type in (int, float)
    if k.type in (int, float):
        base = getattr(made, "base", None)
        ends = [base**made.min, base**made.max] if base else [made.min, made.max]
        for value in ends:  # no position of the slider is refused
            cls(**{k.name: k.type(value)} | BESIDE.get(k.name, {}))
        assert math.isclose(made.value, k.default, rel_tol=1e-9) or (base and k.default < base**made.min)


# what a knob's other values need of its neighbours
BESIDE = dict(local_hidden_size=dict(num_encoder_heads=1, num_decoder_heads=1), context_window=dict(n_gram_sizes=[]))
OTHERS = dict(
    hyperbolic_dims=[8, 8, 4], boundary_points_per_level=[1, 0, 2], initial_curvatures=[0.5, 2.0, 1.0], initial_scales=[2.0, 1.0, 0.5],
    initial_spread_values=[1.0, 2.0, 3.0], rotation_types=["quat", "identity"], transform_types=["linear", "quat"], transform_hidden_dims=[8, 16],
    n_gram_sizes=[2], experts=["o1", "w1"], local_hidden_size=512, num_encoder_heads=4, num_decoder_heads=4,
)


def another(k):
    "An allowed value that is not the default."
    if k.name in OTHERS:
        return OTHERS[k.name]
    if k.low is None or k.high is None:
        return k.default / 2
    if k.type is int:
        return k.default + 1 if k.high is None or k.default < k.high else k.default - 1
    return (k.default + k.high) / 2 if k.default < k.high else (k.default + k.low) / 2


def together():
    "The flags of a group in one command, as building the parser takes longest; by themselves those whose values depend on one another."
    for where, cls in GROUPS.items():
        free = [k for k in walk(cls) if k.name not in OTHERS and not k.choices and not is_list(k)]
        for ks in [free] * bool(free) + [[k] for k in walk(cls) if k not in free]:
            yield pytest.param(where, ks, id=f"{where[1] or where[0]}.{ks[0].name if len(ks) == 1 else 'all'}")


def flagged(group, k):
    "What is typed, and the value it means."
    flag = f"--{group}.{k.name.replace('_', '-')}"
    if k.type is bool:
        return [flag if not k.default else flag.replace(".", ".no-")], not k.default
    value = k.choices[-1] if k.choices else another(k) if k.type is not str else "some.csv"
    return [flag, *map(str, value if is_list(k) else [value])], value


@pytest.mark.parametrize("where, ks", list(together()))
def test_flag(where, ks):
    group, part = where
    chosen = [f"--{group}", part] if part else []
    if group == "mechanism":  # its name is its group
        chosen, group = ["--mechanisms", part], part
    typed = {k.name: flagged(group, k) for k in ks}
    assert all(typed[k.name][1] != k.default or len(k.choices) == 1 for k in ks)
    _, recipe = recipe_from_flags([*chosen, *(word for argv, _ in typed.values() for word in argv)])
    assert {n: recipe[f"{group}.{n}"] for n in typed} == {n: value for n, (_, value) in typed.items()}


@pytest.mark.parametrize("cls", (GROUPS | RIVALS).values(), ids=lambda c: c.__name__)
def test_table(cls):
    for k in walk(cls):
        assert f"`{k.name}`" in table(cls) and k.doc.replace("|", "\\|") in table(cls)
