"Policies: every detail that results hang on, and what is refused. Environments of a few states, so that all of it takes seconds."
import ast
import copy
import inspect
import io
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from adaptive_lab.controller import episodes, policies, policy_gradient
from adaptive_lab.controller.episodes import Choices, Seat, environments
from adaptive_lab.controller.policies import A2C, PPO, REINFORCE, ActorCritic, Learner, evaluate, some
from adaptive_lab.controller.policy_gradient import discounted, divergence, entropy, explained_variance, gae, log_prob, masked, normalised, ppo_loss, reinforce_loss, sample, value_loss
from adaptive_lab.knobs import KnobError

KINDS = (REINFORCE, A2C, PPO)
SMALL = dict(envs=4, hidden=16)


class Made(gymnasium.Env):
    "Observations are drawn anew; the rest is as told: rewards, the step that ends an episode, and how."

    def __init__(self, ends=1, how="terminated", reward=1.0, actions=spaces.Discrete(3), mask=None, in_info=True, bad=None):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,), np.float32), actions
        self.ends, self.how, self.reward, self.mask, self.in_info, self.bad = ends, how, reward, mask, in_info, bad or {}
        if mask is not None and not in_info:
            self.action_masks = lambda: np.array(mask)

    def _info(self):
        return dict(action_mask=np.array(self.mask, np.int8)) if self.mask is not None and self.in_info else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), self._info()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        over = self.t >= self.ends
        reward = self.reward(action) if callable(self.reward) else self.reward
        if self.t == self.bad.get("step"):
            obs, reward = (obs * self.bad["obs"], reward) if "obs" in self.bad else (obs, self.bad["reward"])
        return obs, reward, over and self.how == "terminated", over and self.how == "truncated", self._info()


class Corridor(gymnasium.Env):
    "Five states; the left end pays .2, the right end 1, and a step to the right fails one time in ten. It begins beside the left end."

    observation_space, action_space = spaces.Discrete(5), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.t = 1, 0
        return self.at, {}

    def step(self, action):
        self.at += 1 if action == 1 and self.np_random.random() > 0.1 else -1 if action == 0 else 0
        self.t += 1
        return self.at, {0: 0.2, 4: 1.0}.get(self.at, 0.0), self.at in (0, 4), self.t == 20 and self.at not in (0, 4), {}


class Bandit(gymnasium.Env):
    "Four contexts, six actions of which three are allowed; the best allowed one pays 1, others less. An episode is one step."

    observation_space, action_space = spaces.Box(0, 1, (10,), np.float32), spaces.Discrete(6)
    pays = np.random.default_rng(5).permuted(np.tile(np.linspace(0, 1, 6), (4, 1)), axis=1)

    def _draw(self):
        self.context, self.mask = int(self.np_random.integers(4)), self.np_random.permutation(6) < 3
        return np.concatenate([np.eye(4)[self.context], self.mask]).astype(np.float32), {}

    def action_masks(self):
        return self.mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._draw()

    def step(self, action):
        assert self.mask[action], f"action {action} is not allowed"
        pays = self.pays[self.context]
        reward = float(pays[action] == pays[self.mask].max())
        return self._draw()[0], reward, True, False, {}


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.net.parameters()])


def run(learner, steps):
    return list(learner.learn(steps))


def collected(learner, most=8):
    columns, cut, _ = learner._collect(most)
    return learner._batch(columns, cut)


# --- the arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_sum_of_its_definition(seed):
    g = torch.Generator().manual_seed(seed)
    r, v, f = torch.randn(3, 20, dtype=torch.float64, generator=g)
    last, (d, c) = torch.randn((), dtype=torch.float64, generator=g), torch.rand(2, 20, generator=g) < 0.2
    gamma, lam = torch.rand(2, generator=g).tolist()
    advantages, returns = gae(r, v, last, d, gamma, lam, c, f)
    for t in range(20):
        total = 0.0
        for i in range(t, 20):
            after = 0.0 if d[i] else f[i] if c[i] else v[i + 1] if i < 19 else last
            total += (gamma * lam) ** (i - t) * (r[i] + gamma * after - v[i])
            if d[i] or c[i]:
                break
        assert abs(advantages[t] - total) < 1e-12 and returns[t] == advantages[t] + v[t]


def test_gae_carries_no_gradient_and_takes_lists():
    v = torch.ones(3, requires_grad=True)
    assert not gae([1, 1, 1], v, v.sum(), [False, False, True])[0].requires_grad
    assert gae([1.0], [0.0], 0.0, [True])[0].tolist() == [1.0]  # an episode of one step
    assert gae([1.0], [0.0], 0.0, [True], truncated=[True], final_values=[math.nan])[0].tolist() == [1.0]  # where it ended, nothing follows


@pytest.mark.parametrize(
    "given, word",
    [
        (dict(rewards=[1.0, math.nan]), "rewards at step 1"),
        (dict(values=[math.inf, 0.0]), "values at step 0"),
        (dict(values=[0.0]), r"values has the shape \(1,\)"),
        (dict(terminated=[False]), "terminated has the shape"),
        (dict(last_value=[0.0, 0.0]), "last_value has the shape"),
        (dict(last_value=math.nan), "the value after each step at step 1"),
        (dict(gamma=1.5), "gamma=1.5"),
        (dict(lam=-0.1), "lam=-0.1"),
        (dict(truncated=[False, True]), "without final_values"),
        (dict(rewards=[], values=[], terminated=[]), "and a step"),
    ],
)
def test_gae_names_what_is_wrong(given, word):
    with pytest.raises(ValueError, match=word):
        gae(**dict(rewards=[1.0, 1.0], values=[0.0, 0.0], last_value=0.0, terminated=[False, False]) | given)


def test_returns():
    assert discounted([1, 2, 4], 0.5).tolist() == [3, 4, 4] and discounted([], 0.5).tolist() == []
    assert discounted([[1, 0], [1, 1]], 1.0).tolist() == [[2, 1], [1, 1]]
    with pytest.raises(ValueError, match="rewards at step 2 is inf"):
        discounted([0, 0, math.inf])


def test_advantages_are_normalised_without_nan():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 7 + 3
    assert abs(normalised(x).mean()) < 1e-5 and abs(normalised(x).std(correction=0) - 1) < 1e-5
    assert normalised([-3.0]).tolist() == [-3.0] and normalised([]).tolist() == []
    for equal in ([0.0, 0.0], [0.1] * 9, [1e30, 1e30]):
        assert not normalised(equal).any()
    assert torch.allclose(normalised(x * 1e-12), normalised(x), atol=1e-4)


def test_the_clipped_objective_against_its_cases():
    "Gradients of log π: −ρA inside; 0 where the ratio has gone beyond the clip in the advantage's direction; −ρA on the way back."
    ratio, A = torch.tensor([1.1, 1.5, 0.5, 0.5, 1.5, 0.9]), torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, -1.0])
    p = ratio.log().requires_grad_()
    loss = ppo_loss(p, torch.zeros(6), A, 0.2)
    assert abs(loss.item() + (1.1 + 1.2 - 0.8 + 0.5 - 1.5 - 0.9) / 6) < 1e-6
    loss.backward()
    assert torch.allclose(6 * p.grad, -ratio * A * torch.tensor([1.0, 0, 0, 1, 1, 1]))


def test_losses():
    one = lambda *x: torch.tensor(x)
    assert reinforce_loss(one(-1.0, -2.0), one(3.0, -1.0)).item() == 0.5
    assert value_loss(one(2.0), one(0.0)).item() == 2.0
    assert value_loss(one(2.0), one(3.0), one(0.0), clip=0.5).item() == 0.5 * 2.5**2  # held at .5, which is the worse
    assert value_loss(one(2.0), one(0.0), one(1.9), clip=0.5).item() == 2.0
    p = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert divergence(p, p) == 0 and divergence(p + 0.1, p) == pytest.approx(math.expm1(0.1) - 0.1, rel=1e-4)
    assert divergence(p - 0.1, p) > 0


def test_explained_variance():
    g = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert explained_variance(g, g) == 1 and explained_variance(g + 5, g) == pytest.approx(1) and explained_variance(-g, g) == pytest.approx(-3)
    assert explained_variance(g, torch.ones(100)) == 0


def test_masked_choices():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([True, False, True, False]).expand(5, 4)
    m = masked(logits, mask)
    p = m.softmax(-1)
    assert (p[:, [1, 3]] == 0).all() and torch.allclose(p.sum(-1), torch.ones(5))
    only = logits.detach()[:, [0, 2]]
    both = torch.distributions.Categorical(logits=only)
    assert torch.allclose(entropy(m), both.entropy()) and torch.allclose(log_prob(m, torch.full((5,), 2)), both.log_prob(torch.ones(5)))
    (entropy(m) + log_prob(m, torch.zeros(5, dtype=torch.long))).sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, [1, 3]].any()
    drawn = np.bincount(sample(np.tile(m.detach().numpy()[0], (20_000, 1)), np.random.default_rng(0)), minlength=4) / 20_000
    assert not drawn[[1, 3]].any() and np.allclose(drawn, p.detach()[0], atol=0.012)
    assert torch.equal(masked(logits, None), logits)
    with pytest.raises(ValueError, match="allows no action at all"):
        masked(logits, torch.zeros(5, 4, dtype=torch.bool))


# --- environments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 3, 2]), spaces.MultiDiscrete([[3, 3], [3, 3]]), spaces.MultiBinary(5), spaces.MultiBinary([2, 2])])
def test_every_discrete_space(space):
    c = Choices(space)
    logits = c.arrange(torch.arange(c.width, dtype=torch.float32))
    assert torch.equal(logits[logits.isfinite()], torch.arange(c.width, dtype=torch.float32)) and len(logits) == len(c.sizes)
    assert all(space.contains(a) for a in c.given(np.zeros((3, len(c.sizes)), np.int64)))
    assert all(space.contains(a) for a in c.given(np.tile(np.array(c.sizes) - 1, (3, 1))))
    for kind in KINDS:
        learner = kind(lambda: Made(3, actions=space), **SMALL)
        run(learner, 60)
        assert weights(learner).isfinite().all() and space.contains(learner.act(np.zeros(2), greedy=False))


@pytest.mark.parametrize("in_info", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_actions_are_never_taken(kind, in_info):
    mask = [False, True, True, True, True, False]  # of three choices between 0 and 1: the second one is free
    made = lambda: Made(3, actions=spaces.MultiBinary(3), mask=mask, in_info=in_info)
    learner = kind(made, entropy=0.1, **SMALL)
    run(learner, 200)
    b = collected(learner, 30)
    assert (b.actions[:, 0] == 1).all() and (b.actions[:, 2] == 0).all() and set(b.actions[:, 1].tolist()) == {0, 1}
    logits = masked(learner.choices.arrange(learner.net(b.obs)[0]), b.mask)
    assert (logits.softmax(-1)[:, 0, 0] == 0).all() and weights(learner).isfinite().all()
    assert learner.act(np.zeros(2), mask).tolist()[::2] == [1, 0]


def test_an_episode_may_end_where_nothing_is_allowed():
    class Ends(Made):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, dict(action_mask=np.array([0, 0, 0] if self.t >= 2 else [1, 0, 1]))

    learner = PPO(lambda: Ends(2, mask=[1, 0, 1]), **SMALL)
    run(learner, 300)
    assert weights(learner).isfinite().all()
    with pytest.raises(ValueError, match="action_mask at step 2 of an episode allows no action at all"):
        run(PPO(lambda: Ends(3, mask=[1, 0, 1]), **SMALL), 300)


def test_bad_masks_are_named():
    with pytest.raises(ValueError, match="has 2 entries: give 3"):
        PPO(lambda: Made(mask=[1, 1]), **SMALL)
    with pytest.raises(ValueError, match="comes with some observations and not with others"):
        run(PPO([Made(mask=[1, 1, 1]), Made()], envs=2), 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad, word", [(dict(reward=math.nan), "the reward at step 2 of an episode is nan"), (dict(reward=-math.inf), "the reward at step 2"), (dict(obs=math.nan), "the observation at step 2")])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind, bad, word):
    envs = [Made(3) for _ in range(4)]
    learner = kind(list(envs), **SMALL)
    run(learner, 12)
    before, steps, saved = weights(learner), learner.steps, learner.optimizer.state_dict()["state"]
    envs[2].bad = dict(bad, step=2)
    with pytest.raises(ValueError, match=word):
        run(learner, 200)
    after = learner.optimizer.state_dict()["state"]
    assert torch.equal(weights(learner), before) and learner.steps == steps and all(torch.equal(saved[i]["exp_avg"], after[i]["exp_avg"]) for i in saved)
    envs[2].bad = {}
    learner.load_state_dict(learner.state_dict())  # it can be saved as it stands …
    run(learner, 100)  # … and goes on
    assert learner.steps >= 100 and weights(learner).isfinite().all()


def test_after_a_refusal_all_episodes_begin_anew():
    envs = [Made(50) for _ in range(4)]
    learner = A2C(list(envs), **SMALL)
    envs[2].bad = dict(reward=math.nan, step=3)
    with pytest.raises(ValueError, match="the reward at step 3"):
        run(learner, 40)
    collected(learner, 2)
    assert [len(s.actions) for s in learner.seats] == [2] * 4


def test_large_but_finite_observations_pass():
    assert Seat(Made(), 0, Choices(spaces.Discrete(3)))._see(np.full(2, 3e38, np.float32), {}) is None


def test_a_gradient_that_is_not_finite_moves_no_weight():
    learner = A2C(lambda: Made(2, reward=1e25), normalise=False, **SMALL)
    before = weights(learner)
    with pytest.raises(ArithmeticError, match="not finite"):
        run(learner, 100)
    assert torch.equal(weights(learner), before)


# --- details of learners ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("envs, rollout", [(1, 1), (1, 3), (4, 1), (4, 8)])
def test_one_step_episodes_and_single_samples_give_no_nan(kind, envs, rollout):
    learner = kind(lambda: Made(1), envs=envs, rollout=rollout, hidden=8)
    figures = run(learner, 24)
    assert weights(learner).isfinite().all() and learner.steps == 24
    assert all(v is None or math.isfinite(v) for f in figures for v in f.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_episode_is_worth_what_its_last_observation_is_and_an_ended_one_nothing(kind):
    for how in ("terminated", "truncated"):

        class Told(Made):
            def step(self, action):
                out = super().step(action)
                self.seen = [*getattr(self, "seen", []), out[0]]
                return out

        envs = [Told(1, how, reward=2.0) for _ in range(3)]
        learner = kind(envs, gamma=0.5, envs=3)
        b = collected(learner, 5)
        seen = np.stack([obs for row in zip(*(e.seen for e in envs)) for obs in row])  # not what reset() gave
        with torch.no_grad():
            final = learner.net(torch.from_numpy(seen))[1]
        assert torch.allclose(b.returns, 2 + 0.5 * final if how == "truncated" else torch.full((len(seen),), 2.0), atol=1e-6)


def test_the_last_value_is_that_of_what_comes_next():
    learner = A2C(lambda: Made(100), envs=2, lam=0.0, gamma=0.5, rollout=3)
    b = collected(learner, 3)
    with torch.no_grad():
        after = learner.net(torch.from_numpy(np.stack([s.obs for s in learner.seats])))[1]
    assert torch.allclose(b.returns[-2:], 1 + 0.5 * after) and torch.allclose(b.returns[:-2], 1 + 0.5 * b.values[2:])


def test_reinforce_takes_whole_episodes_and_their_returns():
    class Long(Made):  # episodes of 1, 2, 3 and 4 steps
        made = 0

        def __init__(self):
            Long.made += 1
            super().__init__(Long.made)

    learner = REINFORCE(Long, gamma=0.5, **SMALL)
    b = collected(learner, learner.knobs.rollout)
    assert len(b.obs) == 1 + 2 + 3 + 4
    assert np.allclose(sorted(b.returns.tolist()), sorted(sum((discounted([1.0] * n, 0.5).tolist() for n in (1, 2, 3, 4)), [])))
    assert [len(s.actions) for s in learner.seats] == [0] * 4  # each waits at the beginning of its next one


def test_old_probabilities_are_those_of_acting():
    b = collected(PPO(lambda: Made(3), **SMALL))
    assert b.log_p.exp().allclose(torch.full_like(b.log_p, 1 / 3), atol=0.02)
    learner = PPO(lambda: Made(3, actions=spaces.MultiBinary(4)), **SMALL)
    run(learner, 300)
    b = collected(learner)
    p = torch.distributions.Categorical(logits=learner.net(b.obs)[0].view(-1, 4, 2)).log_prob(b.actions).sum(-1)
    assert torch.allclose(b.log_p, p, atol=1e-5) and torch.allclose(learner._log_p(b), p, atol=1e-5)


@pytest.mark.parametrize("mask", [None, [1, 0, 1]])
def test_the_ratio_is_to_the_policy_that_acted(monkeypatch, mask):
    "It begins at 1, with the mask of acting, and the policy that acted stays the same while the other one moves."
    seen = []
    monkeypatch.setattr(policies, "ppo_loss", lambda *a: seen.append((a[0].detach(), a[1])) or ppo_loss(*a))
    learner = PPO(lambda: Made(3, mask=mask), epochs=4, minibatch=1000, rollout=8, lr=0.05, **SMALL)
    run(learner, 32)
    (first, old), (last, still) = seen[0], seen[-1]
    assert len(seen) == 4 and torch.allclose(first, old, atol=1e-6) and not torch.allclose(last, still, atol=1e-2)
    assert torch.allclose(old.sort()[0], still.sort()[0], atol=1e-6)


def test_environments_and_learners_draw_differently():
    obs = [s.obs.tobytes() for seed in range(3) for s in PPO(Made, seed=seed, **SMALL).seats]
    assert len(set(obs)) == 12


def test_weights_begin_orthogonal():
    net = ActorCritic(6, 3, 32, torch.Generator().manual_seed(0))
    for part, last in ((net.pi, 0.01), (net.v, 1.0)):
        for layer, gain in zip(part[::2], (2**0.5, 2**0.5, last)):
            w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            assert torch.allclose(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-5) and not layer.bias.any()
    x = torch.randn(9, 6)
    assert np.allclose(net.act(x.numpy()), net(x)[0].detach(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_and_adam_has_its_epsilon(kind):
    learner = kind(lambda: Made(3, reward=1e4), max_norm=0.25, normalise=False, **SMALL)
    figures = run(learner, 100)
    held = torch.cat([p.grad.flatten() for p in learner.net.parameters()]).norm().item()
    assert figures[-1]["gradient_norm"] > 10 and held == pytest.approx(0.25, rel=1e-3)
    assert learner.optimizer.param_groups[0]["eps"] == 1e-5


def test_learning_rate_and_clip_fall_to_zero(monkeypatch):
    clips = []
    monkeypatch.setattr(policies, "ppo_loss", lambda *a: clips.append(a[-1]) or ppo_loss(*a))
    how = dict(lr=0.01, clip=0.2, rollout=5, epochs=1, minibatch=1000, **SMALL)
    rates = [f["lr"] for f in run(PPO(lambda: Made(3), **how), 100)]
    assert np.allclose(rates, 0.01 * np.array([1, 0.8, 0.6, 0.4, 0.2])) and np.allclose(clips, 0.2 * np.array([1, 0.8, 0.6, 0.4, 0.2]))
    clips.clear()
    assert {f["lr"] for f in run(PPO(lambda: Made(3), anneal=False, **how), 100)} == {0.01} and set(clips) == {0.2}


def test_each_sample_comes_once_an_epoch_in_another_order():
    learner = PPO(lambda: Made(3), epochs=3, minibatch=4, **SMALL)
    parts = list(learner._minibatches(10))
    assert [len(p) for p in parts] == [4, 4, 2] * 3
    orders = [torch.cat(parts[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(o) == list(range(10)) for o in orders) and len({tuple(o) for o in orders}) == 3 and orders[0] != list(range(10))


def test_an_update_ends_when_the_policy_has_moved_too_far():
    how = dict(lr=0.05, epochs=10, minibatch=16, rollout=8, anneal=False, **SMALL)
    pays = lambda action: float(action == 0)
    free, held = (run(PPO(lambda: Made(1, reward=pays), target_kl=kl, **how), 32)[0] for kl in (0.0, 0.01))
    assert free["minibatches"] == 20 and 1 <= held["minibatches"] < 20 and held["kl"] < free["kl"]


def test_the_entropy_bonus_keeps_the_policy_open():
    pays = lambda action: float(action == 0)
    closed, open_ = (run(A2C(lambda: Made(1, reward=pays), entropy=e, lr=0.02, anneal=False, rollout=8, **SMALL), 3000)[-1]["entropy"] for e in (0.0, 5.0))
    assert closed < 0.3 < 0.95 < open_ / math.log(3)


def test_value_clip_reaches_the_loss(monkeypatch):
    given = []
    monkeypatch.setattr(policies, "value_loss", lambda v, r, old, clip: given.append((old, clip)) or value_loss(v, r, old, clip))
    learner = PPO(lambda: Made(3), value_clip=0.3, minibatch=1000, epochs=2, rollout=4, **SMALL)
    run(learner, 16)
    assert [c for _, c in given] == [0.3, 0.3] and sorted(given[0][0].tolist()) == sorted(given[1][0].tolist())  # those of acting, both times


def test_advantages_are_normalised_in_each_minibatch(monkeypatch):
    seen = []
    monkeypatch.setattr(policies, "ppo_loss", lambda *a: seen.append(a[2]) or ppo_loss(*a))
    run(PPO(lambda: Made(4), minibatch=8, **SMALL), 64)
    assert all(abs(a.mean()) < 1e-5 and abs(a.std(correction=0) - 1) < 1e-4 for a in seen) and {len(a) for a in seen} == {8}
    seen.clear()
    run(PPO(lambda: Made(4, reward=5.0), normalise=False, minibatch=8, **SMALL), 64)
    assert max(a.mean() for a in seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_may_reuse_its_array(kind):
    class Reuses(Made):
        def _kept(self, obs):
            self.kept = getattr(self, "kept", np.zeros(2, np.float32))
            self.kept[:] = obs
            return self.kept

        def reset(self, *, seed=None, options=None):
            obs, info = super().reset(seed=seed)
            return self._kept(obs), info

        def step(self, action):
            obs, *rest = super().step(action)
            return self._kept(obs), *rest

    one, other = (kind(lambda: made(3, "truncated"), **SMALL) for made in (Made, Reuses))
    assert run(one, 60) == run(other, 60) and torch.equal(weights(one), weights(other))


def test_steps_are_those_of_the_environments():
    count = [0]

    class Counted(Made):
        def step(self, action):
            count[0] += 1
            return super().step(action)

    learner = PPO(lambda: Counted(7), rollout=16, **SMALL)
    figures = run(learner, 200)
    assert count == [200] and learner.steps == figures[-1]["steps"] == 200


# --- the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_and_leaves_global_generators_alone(kind):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = kind(Corridor, seed=3, **SMALL)
    history = run(a, 600)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(99), np.random.seed(99)
    b, other = kind(Corridor, seed=3, **SMALL), kind(Corridor, seed=4, **SMALL)
    assert run(b, 600) == history and torch.equal(weights(a), weights(b))
    run(other, 600)
    assert not torch.equal(weights(a), weights(other))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [Corridor, lambda: Made(7, "truncated", actions=spaces.MultiBinary(2)), Bandit])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_learner_goes_on_bit_for_bit(kind, make):
    how = dict(seed=1, rollout=11, **SMALL)  # a saved one stands in the middle of episodes
    whole, half, rest = (kind(make, **how) for _ in range(3))
    history = run(whole, 500)
    for n, f in enumerate(half.learn(500)):
        if f["steps"] > 200:
            break
    assert kind is REINFORCE or make is Bandit or any(s.actions for s in half.seats)
    rest.load_state_dict(through_file(half.state_dict()))
    assert run(rest, 500) == history[n + 1 :] and torch.equal(weights(whole), weights(rest))
    assert [s.obs.tolist() for s in whole.seats] == [s.obs.tolist() for s in rest.seats]


def test_knobs_come_with_the_state():
    a, b = PPO(Corridor, lr=0.02, **SMALL), PPO(Corridor, **SMALL)
    b.load_state_dict(a.state_dict())
    assert b.knobs == a.knobs


@pytest.mark.parametrize(
    "other, word",
    [
        (lambda: A2C(Corridor, **SMALL), "the state is of A2C with 4 environments, and this is PPO with 4"),
        (lambda: PPO(Corridor, envs=3, hidden=16), "with 3 environments"),
        (lambda: PPO(Corridor, envs=4, hidden=8), "network has the shapes"),
    ],
)
def test_a_state_of_something_else_is_refused(other, word):
    learner, state = PPO(Corridor, **SMALL), other().state_dict()
    before = weights(learner)
    with pytest.raises(ValueError, match=word):
        learner.load_state_dict(state)
    with pytest.raises(ValueError, match="the state has no knobs, learner"):
        learner.load_state_dict({"net": {}})
    assert torch.equal(weights(learner), before)


def half_way(kind=A2C, seed=0, **how):
    "A learner in the middle of its second episodes."
    learner = kind(lambda: Made(12), seed, **dict(rollout=9, **SMALL) | how)
    run(learner, 72)
    return learner


def same(a, b):
    "Are two states the same, bit for bit?"
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_state_stays_as_it_is_when_the_learner_goes_on():
    learner, twin = half_way(), half_way()
    state = learner.state_dict()
    kept = copy.deepcopy(state)
    run(learner, 144)
    assert same(state, kept) and not same(state, learner.state_dict())
    twin.load_state_dict(state)
    run(twin, 144)
    assert same(state, kept) and same(twin.state_dict(), learner.state_dict())


def test_learners_of_one_state_share_nothing():
    a, b = half_way(), half_way(seed=1)
    live = a.state_dict() | dict(net=a.net.state_dict(), optimizer=a.optimizer.state_dict())  # not a copy
    b.load_state_dict(live)
    before = copy.deepcopy(a.state_dict())
    assert same(before, b.state_dict())
    live["seats"][0]["start"]["state"]["state"] = 1
    assert same(before, b.state_dict())
    run(b, 144)
    assert same(before, a.state_dict())


def _put(value, *path):
    "A function that puts a value somewhere into a state."

    def put(state):
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return put


def _drop(*path):
    def drop(state):
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return drop


ADAM = ("optimizer", "state", 2)
SPOILED = [
    (_put({}, "optimizer"), "optimizer of the state"),
    (_put([], "optimizer", "param_groups"), "optimizer of the state"),
    (_put([3], "optimizer", "param_groups", 0, "params"), "params is"),
    (_put(True, "optimizer", "param_groups", 0, "amsgrad"), "amsgrad is True"),
    (_put(torch.zeros(3), *ADAM, "exp_avg"), "parameter 2 has the shapes"),
    (_put(torch.zeros(16), *ADAM, "exp_avg_sq"), "parameter 2 has the shapes"),
    (_put(torch.zeros(2), *ADAM, "step"), "parameter 2 has the shapes"),
    (_put(7, *ADAM, "step"), "optimizer of the state"),
    (_put(torch.full((16, 16), math.nan), *ADAM, "exp_avg"), "not finite"),
    (_put(torch.full((16, 16), -1.0), *ADAM, "exp_avg_sq"), "squares below 0"),
    (_drop(*ADAM, "exp_avg"), "parameter 2 has the shapes"),
    (_put({}, "optimizer", "state", 99), r"averages of \{99\}"),
    (_put({}, "rng"), "rng of the state"),
    (_put(np.random.MT19937(0).state, "rng"), "rng of the state"),
    (_put({"a": 1}, "seats", 1, "start"), "seats of the state"),
    (_put(None, "seats", 1, "start"), "neither a seed nor"),
    (_drop("seats", 3, "obs"), "seats of the state.*obs"),
    (_put(torch.tensor([7]), "seats", 3, "actions"), "seats of the state"),
    (_put(None, "seats"), "seats of the state"),
    (_put("x", "steps"), "steps='x'"),
    (_put(None, "steps"), "steps=None"),
    (_put(-5, "steps"), "steps=-5"),
    (_put(True, "steps"), "steps=True"),
    (_put(7, "knobs", "envs"), "envs is 7, and here 4"),
    (_put(64, "knobs", "hidden"), "hidden is 64, and here 16"),
    (_put(2.0, "knobs", "gamma"), "knobs of the state.*gamma=2.0"),
    (_put(None, "knobs"), "knobs of the state"),
    (_put(torch.full((16,), math.nan), "net", "pi.0.bias"), "pi.0.bias is not finite"),
    (_put(torch.zeros(2), "net", "pi.0.bias"), "the state's network has the shapes"),
    (_put("weights", "net", "pi.0.bias"), "net of the state|network has the shapes"),
    (_put([], "net"), "net of the state"),
]


@pytest.mark.parametrize("spoil, word", SPOILED)
def test_a_state_that_is_not_whole_is_refused_and_nothing_changes(spoil, word):
    learner, state = half_way(), half_way(seed=1).state_dict()
    before = learner.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=word):
        learner.load_state_dict(state)
    assert same(learner.state_dict(), before) and all(len(s.actions) == 6 for s in learner.seats)
    twin = half_way()
    assert run(learner, 144) == run(twin, 144) and same(learner.state_dict(), twin.state_dict())


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="the state has no knobs, learner"):
        half_way().load_state_dict(state)


def test_a_network_that_refuses_a_state_keeps_its_weights():
    class Refuses(ActorCritic):
        def load_state_dict(self, state, *rest, **more):
            super().load_state_dict(state, *rest, **more)
            if self.refuse:
                self.refuse = False
                raise RuntimeError("not this one")

    a, b = (half_way(net=Refuses(2, 3, 8, torch.Generator().manual_seed(i))) for i in range(2))
    a.net.refuse, before = True, a.state_dict()
    with pytest.raises(ValueError, match="not this one"):
        a.load_state_dict(b.state_dict())
    assert same(a.state_dict(), before)


def test_environments_that_come_out_elsewhere_are_refused_and_nothing_changes():
    class Own(Made):  # draws from a generator of its own
        own = np.random.default_rng(0)

        def step(self, action):
            _, *rest = super().step(action)
            return self.own.uniform(-1, 1, 2).astype(np.float32), *rest

    saved, learner = PPO(lambda: Own(50), **SMALL), PPO(lambda: Made(50), **SMALL)
    run(saved, 100), run(learner, 60)
    before = weights(learner), [s.obs.copy() for s in learner.seats], learner.steps
    with pytest.raises(ValueError, match="do not come to the saved observations"):
        learner.load_state_dict(saved.state_dict())
    assert torch.equal(weights(learner), before[0]) and learner.steps == before[2]
    assert all(np.array_equal(s.obs, o) for s, o in zip(learner.seats, before[1]))


# --- does it learn? -----------------------------------------------------------------------------------

LEARN = {
    REINFORCE: dict(lr=0.02, entropy=0.02),
    A2C: dict(lr=0.02, entropy=0.02, rollout=8),
    PPO: dict(lr=0.01, entropy=0.02, rollout=32, minibatch=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_pass_a_small_reward_for_a_large_one(kind):
    "The near end pays .2 and the far one 1: it takes the value of states in between, and the discount."
    learner = kind(Corridor, seed=0, gamma=0.95, hidden=16, **LEARN[kind])
    before = evaluate(learner, Corridor, 50, greedy=False).mean()
    run(learner, 4000)
    assert before < 0.6 and evaluate(learner, Corridor, 50).mean() == 1.0 and evaluate(learner, Corridor, 200, greedy=False).mean() > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_best_allowed_action(kind):
    learner = kind(Bandit, seed=0, hidden=32, **LEARN[kind] | dict(envs=16))
    before = evaluate(learner, Bandit, 200, greedy=False).mean()
    run(learner, 6000)
    assert before < 0.5 < 0.85 < evaluate(learner, Bandit, 300).mean()


def test_a_network_of_ones_own():
    class Linear(torch.nn.Module):
        def __init__(self, n):
            super().__init__()
            self.w = torch.nn.Linear(5, n + 1)

        def forward(self, x):
            y = self.w(x)
            return y[:, :-1], y[:, -1]

    learner = PPO(Corridor, net=Linear(2), gamma=0.95, **LEARN[PPO])
    run(learner, 4000)
    assert evaluate(learner, Corridor, 50).mean() == 1.0
    with pytest.raises(ValueError, match=r"net gives the shapes \[\(3, 4\), \(3,\)\]"):
        PPO(Corridor, net=Linear(4))


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_input_is_named():
    for wrong, error, word in [
        (lambda: PPO("Pendulum-v1"), ValueError, "action_space is Box.*Discrete, MultiDiscrete and MultiBinary are allowed"),
        (lambda: PPO([Made()], envs=2), ValueError, "env gives 1 environments and envs=2"),
        (lambda: PPO(Made(), envs=2), ValueError, "env gives 1 environments"),
        (lambda: PPO([Made(), Made(actions=spaces.Discrete(4))], envs=2), ValueError, "differ in their action_space"),
        (lambda: environments([e := Made(), e], 2), ValueError, "the same environment twice"),
        (lambda: PPO(Made, clip=1.5), KnobError, "clip=1.5 is not allowed"),
        (lambda: A2C(Made, clip=0.2), KnobError, "unknown knob 'clip'"),
        (lambda: PPO(Made).learn(0), ValueError, "steps=0"),
        (lambda: PPO(Made).learn(1e4), ValueError, "steps=10000.0"),
        (lambda: PPO(Made).learn(True), ValueError, "steps=True"),
        *((lambda seed=seed: PPO(Made, seed), ValueError, f"seed={seed}") for seed in (-1, None, 1.5, 2**70, True)),
        (lambda: run(PPO(lambda: Made(reward=None)), 10), ValueError, "the reward at step 1 of an episode is None"),
        (lambda: PPO(lambda: Given([1.0, math.nan, 0.0])), ValueError, r"action_mask at step 0 of an episode is \[1.0, nan, 0.0\]"),
        (lambda: PPO(lambda: Given([1, 2, 0])), ValueError, r"action_mask at step 0 of an episode is \[1, 2, 0\]"),
        (lambda: PPO(Made).act(np.zeros(2), [math.nan, 1, 1]), ValueError, "action_mask at an observation"),
        (lambda: evaluate(PPO(Made), Made, episodes=-1), ValueError, "episodes=-1"),
        (lambda: evaluate(PPO(Made), Made, seed=-1), ValueError, "seed=-1"),
        (lambda: evaluate(PPO(Made), lambda: Made(actions=spaces.Discrete(4))), ValueError, r"env has Discrete\(4\)"),
        (lambda: evaluate(PPO(Made), Corridor), ValueError, r"env has Discrete\(2\)"),
    ]:
        with pytest.raises(error, match=word):
            wrong()


class Given(Made):
    "An environment whose mask is what is given, as it stands."

    def __init__(self, mask):
        super().__init__()
        self.action_masks = lambda: mask


def test_whole_numbers_of_numpy_are_whole_numbers():
    a, b = PPO(Made, np.int64(3), **SMALL), PPO(Made, 3, **SMALL)
    assert run(a, np.int64(40)) == run(b, 40) and len(evaluate(a, Made, np.int64(2), np.int64(1))) == 2


def test_an_environment_that_the_learner_sits_in_is_not_moved():
    envs = [Made(50) for _ in range(4)]
    learner = A2C(list(envs), **SMALL)
    run(learner, 40)
    at = envs[2].t
    for env in (envs[2], gymnasium.Wrapper(envs[2])):
        with pytest.raises(ValueError, match="env is one that the learner sits in"):
            evaluate(learner, env)
    assert envs[2].t == at > 0


def test_dropout_is_off_where_a_policy_is_asked_and_on_again_after():
    class Drops(ActorCritic):
        act = property()  # torch computes it

        def __init__(self):
            super().__init__(2, 3, 16, torch.Generator().manual_seed(0))
            self.drop, self.kept = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2).eval()

        def forward(self, obs):
            return super().forward(self.drop(self.kept(obs)))

    learner = A2C(lambda: Made(9), net=Drops(), **SMALL)
    run(learner, 200)
    modes = [m.training for m in learner.net.modules()]
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    first, second = ([learner.act(o) for o in obs] for _ in range(2))
    assert first == second and len(set(first)) > 1
    assert modes == [m.training for m in learner.net.modules()] and learner.net.training and not learner.net.kept.training
    asked = []
    learner.net.drop.register_forward_hook(lambda m, *_: asked.append(m.training))
    evaluate(learner, lambda: Made(9), 2)
    assert asked and not any(asked) and modes == [m.training for m in learner.net.modules()]


def test_gymnasium_is_imported_only_where_it_is_used():
    for module in (policy_gradient, episodes, policies):
        tree = ast.parse(inspect.getsource(module))
        names = {a.name for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names} | {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not any("gymnasium" in (n or "") for n in names)
