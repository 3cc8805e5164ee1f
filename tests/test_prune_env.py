"Pruning as an environment, and what it pays: heads that are not there, a model that moves, and input that is refused with nothing changed."
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from adaptive_lab.controller.environment import PruneEnv
from adaptive_lab.controller.feedback import Worth, calculate_reward, finite
from adaptive_lab.controller.masks import TableLosses
from adaptive_lab.controller.model import AdaptiveTransformer

X, Y = torch.randint(0, 256, (2, 4, 17), generator=torch.Generator().manual_seed(0))[:, :, :16]


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaptiveTransformer(2, 3, 12, 16)


def table():
    return TableLosses(3 - np.array([bin(i).count("1") for i in range(64)]) / 10, 2, 3)


def state(env):
    return env.mask.tolist(), env.steps, env.loss, env.value, env.over, list(env.ends)


def test_heads_that_are_not_there_are_in_no_mask_and_pay_nothing(model):
    model.set_gate(0, 1, 0.0), model.prune()
    env = PruneEnv(model, X, Y, budget=0.5, efficiency_factor=10.0)
    obs, info = env.reset()
    assert info["kept"] == 5 and not info["mask"][0, 1] and not info["action_mask"][1] and info["action_mask"].sum() == 6
    assert info["worth"] == 0 and obs[1] == 0 and obs[-3] == 1  # the whole is what is there
    asked = env.losses.asked
    for _ in range(2):
        _, reward, *_, info = env.step(1)
        assert reward == 0 and info["kept"] == 5 and not info["mask"][0, 1]
    assert env.losses.asked == asked and env.step(0)[-1]["kept"] == 4 and env._observation()[-3] == np.float32(4 / 5)
    with pytest.raises(ValueError, match=r"has head \(0, 1\), which is not there"):
        env.reset(options=dict(mask=np.ones((2, 3))))
    with pytest.raises(ValueError, match="of 5 heads is none"):
        PruneEnv(model, X, Y, budget=0.19)


def test_a_model_without_heads_is_refused(model):
    for place in np.ndindex(2, 3):
        model.set_gate(*place, 0.0)
    model.prune()
    with pytest.raises(ValueError, match="no head left"):
        PruneEnv(model, X, Y)


def test_the_ends_are_measured_anew_when_the_model_has_changed(model):
    env = PruneEnv(model, X, Y)
    env.reset(), env.reset()
    assert env.losses.asked == 2
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):
        torch.nn.functional.cross_entropy(model(X).flatten(0, 1), Y.flatten()).backward()
        adam.step(), adam.zero_grad()
    _, info = env.reset()
    assert env.losses.asked == 4 and info["worth"] == 0 and info["loss"] == env.losses(np.ones((2, 3), bool))[0]
    model.set_gate(1, 2, 0.0), model.prune()
    _, info = env.reset()
    assert info["kept"] == 5 and info["worth"] == 0 and info["loss"] == env.losses(env.mask)[0]


def test_what_was_changed_behind_the_back_of_autograd_is_measured_anew(model):
    env = PruneEnv(model, X.clone(), Y.clone())
    for change in (lambda: model.logits.weight.data.mul_(0), lambda: model.gate_ffn.data.mul_(0.5), lambda: env.losses.y.data.add_(1).remainder_(256)):
        model.logits.weight.data.add_(torch.linspace(0, 1, 12))
        env.reset()
        asked = env.losses.asked
        change()
        _, info = env.reset()
        assert env.losses.asked == asked + 2 and info["worth"] == 0 and info["loss"] == env.losses(np.ones((2, 3), bool))[0]


@pytest.mark.parametrize("y", [Y + 200, -Y - 1, Y.float(), Y > 9, Y[:2], Y[:0]])
def test_next_bytes_that_are_none_are_refused(model, y):
    with pytest.raises(ValueError, match="y "):
        PruneEnv(model, X, y)
    assert PruneEnv(model, X.byte(), Y.byte()).reset()[1]["loss"] == PruneEnv(model, X, Y).reset()[1]["loss"]


def test_a_table_is_measured_once():
    env = PruneEnv(table())
    env.reset(), env.reset(seed=3)
    assert env.losses.asked == 2


def test_a_diverged_model_changes_nothing(model):
    env = PruneEnv(model, X, Y)
    env.reset(), env.step(0)
    before = state(env)
    with torch.no_grad():
        model.bytes.weight.fill_(math.nan)
    for act in (lambda: env.step(1), env.reset, lambda: env.reset(options=dict(mask=np.eye(2, 3)))):
        with pytest.raises(ValueError, match="nan is not finite"):
            act()
        assert state(env) == before


@pytest.mark.parametrize("options", [[1], {"msk": 1}, "mask", *({"mask": m} for m in (True, None, "abc", np.ones(3), np.ones((1, 2, 3)), np.full((2, 3), 0.5), np.full((2, 3), np.nan), np.full((2, 3), "1"), [[1], [1, 1]]))])
def test_options_that_are_none_are_refused_and_the_episode_stays(options):
    env = PruneEnv(table())
    env.reset(seed=1), env.step(0)
    before, drawn = state(env), env.np_random.bit_generator.state
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=2, options=options)
    assert state(env) == before and env.np_random.bit_generator.state == drawn


def test_a_mask_to_begin_with_stays_the_callers():
    mine = np.eye(2, 3, dtype=bool)
    env = PruneEnv(table())
    env.reset(options=dict(mask=mine)), env.step(0)
    assert mine.sum() == 2
    env.reset(options=dict(mask=mine))
    mine[:] = True
    assert env.mask.sum() == 2 and env.step(0)[-1]["kept"] == 1 and env.reset(options={})[1]["kept"] == 6


def test_an_episode_must_have_begun_and_not_ended():
    env = PruneEnv(table(), max_steps=2)
    for early in (lambda: env.step(0), env.render, env.action_masks):
        with pytest.raises(ResetNeeded):
            early()
    for actions in ((6,), (0, 1)):
        env.reset()
        for a in actions:
            env.step(a)
        before = state(env)
        with pytest.raises(ResetNeeded, match="no episode is going on"):
            env.step(2)
        assert state(env) == before and env.action_masks().any()


def test_what_an_environment_is_made_of_is_named(model):
    for wrong, word in [
        (lambda: PruneEnv(table(), render_mode="human"), "render_mode='human'"),
        (lambda: PruneEnv(table(), max_steps=True), "max_steps=True"),
        (lambda: PruneEnv(table(), max_steps=2.0), "max_steps=2.0"),
        (lambda: PruneEnv(model, X.numpy(), Y), "X and y are needed"),
        (lambda: PruneEnv(model, X, Y[0]), "X and y are needed"),
        (lambda: PruneEnv(table(), features=np.ones((2, 3, 0))), r"features of shape \(2, 3, 0\)"),
        (lambda: PruneEnv(table(), features="many"), "features are no numbers"),
        (lambda: PruneEnv(table(), features=[[1], [1, 2]]), "features are no numbers"),
    ]:
        with pytest.raises(ValueError, match=word):
            wrong()
    env = PruneEnv(table(), max_steps=np.int64(3), render_mode="ansi")
    assert env.max_steps == 3 and env.reset() and env.render() == "###\n###"


def test_gymnasium_finds_nothing_to_object_to(model):
    from gymnasium.utils.env_checker import check_env

    model.set_gate(0, 1, 0.0), model.prune()
    check_env(PruneEnv(model, X, Y), skip_render_check=True)
    assert isinstance(PruneEnv(table()).action_space, gymnasium.spaces.Discrete)


# --- what is paid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("now, before, factor, paid", [(1e308, -1e308, 1e308, 1.0), (1e308, -1e308, 0.0, -1.0), (-1e308, 1e308, 1e308, 1.0), (2.0, 2.1, 0.4, math.tanh(0.1 + 40))])
def test_the_first_reward_is_in_its_range_at_any_size(now, before, factor, paid):
    assert calculate_reward(dict(loss=now, pruned_percentage=100), dict(loss=before), factor) == pytest.approx(paid)


def test_the_first_reward_is_that_of_its_formula_bit_for_bit():
    for a, b, p, f in np.random.default_rng(0).uniform(0, 1, (500, 4)) * [5, 5, 1, 2]:
        assert calculate_reward(dict(loss=a, pruned_percentage=p), dict(loss=b), f) == math.tanh(b - a + p * f)


@pytest.mark.parametrize("wrong", [None, "loss", ["loss"], 3])
def test_metrics_that_are_no_dict_are_named(wrong):
    with pytest.raises(ValueError, match="previous_metrics=.*give a dict with 'loss'"):
        calculate_reward(dict(loss=1, pruned_percentage=0), wrong, 0.1)
    with pytest.raises(ValueError, match="current_metrics=.*give a dict with 'loss'"):
        calculate_reward(wrong, dict(loss=1), 0.1)


@pytest.mark.parametrize("wrong, word", [("1.5", "'1.5' is not a number"), (b"1", "is not a number"), (None, "is not a number"), (10**400, "inf is not finite"), (math.nan, "nan is not finite")])
def test_a_number_is_a_number(wrong, word):
    with pytest.raises(ValueError, match=f"x=.*{word}"):
        finite(wrong, "x")
    assert finite(np.float32(0.5), "x") == 0.5 and finite(True, "x") == 1 and Worth().budget == 0.5
