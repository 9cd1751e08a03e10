"""The study of papers: its runner on a problem whose solution is known, tree search, and some problems."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from benchmarks import mcts, papers, papers_report
from benchmarks.problems import architecture, ensemble_decay, guidance
from benchmarks.problems.paper import Answer, Case, Evidence, Paper, Score

# --- The runner -------------------------------------------------------------------------------------------

# inner: w = target of training shrunk by 1 / (1 + l2); best where that is the target of validation, at l2 =
# 1.
PROBLEM = bilevel.Problem(
    lambda w, h, x: 0.5 * jnp.sum((w - x) ** 2) + 0.5 * h["l2"] * jnp.sum(w**2),
    lambda w, h, x: 0.5 * jnp.sum((w - x) ** 2),
    constraints=bilevel.positive(),
)
METHOD = bilevel.alternating(bilevel.implicit(), bilevel.newton(), optax.adam(0.3))


def case(seed: int) -> Case:
    train, valid = jnp.full(3, 2.0), jnp.full(3, 1.0)

    @jax.jit
    def judge(hparams, key):
        miss = 0.5 * jnp.sum((train / (1 + hparams["l2"]) - valid) ** 2)
        return Score(miss, miss + 1)

    return Case(
        problem=PROBLEM, params=jnp.zeros(3), hparams={"l2": jnp.asarray(0.1)}, train=train, valid=valid,
        method=METHOD, steps=60, box={"l2": (1e-3, 1e3)}, spread=lambda numbers: {"l2": numbers["l2"]},
        judge=judge,
    )  # fmt: skip


def toy(verdict: str) -> Paper:
    return Paper(
        "a toy", "nobody", "l2 is 1", case, lambda cases, answers: evidence(verdict, answers), "loss"
    )


def evidence(verdict, answers) -> Evidence:
    found = [float(own["hypergradient"].hparams["l2"]) for own in answers.values()]
    return Evidence(verdict, f"l2 is {found[0]:.2f}", lambda ax: ax.plot(found))


WITHOUT_OPTUNA = {name: arm for name, arm in papers.ARMS.items() if name != "optuna"}


def test_arms_take_the_time_of_the_gradient_and_are_judged_alike():
    rows, answers = papers.run_seed("toy", case(0), 0, WITHOUT_OPTUNA)
    by_arm = {row.arm: row for row in rows}
    assert rows[0].arm == "hypergradient"
    np.testing.assert_allclose(answers["hypergradient"].hparams["l2"], 1.0, atol=0.01)
    expected = 0.5 * 3 * (2 / 1.1 - 1) ** 2
    np.testing.assert_allclose(by_arm["default"].valid, expected)
    np.testing.assert_allclose(by_arm["default"].test, expected + 1)
    assert by_arm["random"].seconds >= by_arm["hypergradient"].seconds
    assert by_arm["hypergradient"].valid < 1e-4
    # On a fast machine one draw of many may come closer than the gradient: which is first is luck.
    assert by_arm["random"].valid < by_arm["default"].valid
    assert (by_arm["default"].tried, by_arm["hypergradient"].tried) == (0, 60)


def test_a_report_shows_rows_verdict_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        papers.Row("toy", seed, arm, 1.0, 3, valid, valid + 1, "l2: 1")
        for seed in (0, 1)
        for arm, valid in (("hypergradient", 0.1), ("random", 0.2 - 0.15 * seed))
    ]
    answers = {0: {"hypergradient": Answer({"l2": 1.0}, 3)}}
    papers_report.save(tmp_path, "toy", toy("holds"), rows, evidence("holds", answers))
    papers_report.show(tmp_path, ["toy"])
    shown = capsys.readouterr().out
    assert "HOLDS: l2 is 1.00" in shown
    (random,) = (line for line in shown.splitlines() if line.strip().startswith("random"))
    assert "0.1250 +- 0.0750" in random
    assert "1 of 2" in random
    assert (tmp_path / "toy.png").stat().st_size > 5000
    page = papers_report.page(tmp_path, ["toy"])
    assert "| [a toy](#a-toy) | l2 is 1 | holds |" in page
    assert "| random | 0.1250 ± 0.0750 | 1.1250 ± 0.0750 | 1 of 2 | 3 | 1.0 |" in page
    assert json.loads((tmp_path / "toy.json").read_text())["claim"] == "l2 is 1"
    with pytest.raises(ValueError, match="a verdict is one of"):
        papers_report.save(tmp_path, "toy", toy("yes"), rows, evidence("yes", answers))


def test_every_paper_says_what_it_is():
    for name in papers.PAPERS:
        own = papers.paper(name)
        assert own.title
        assert own.claim
        assert any(character.isdigit() for character in own.source)


def test_a_training_that_fails_scores_infinity():
    broken = case(0).__class__(**{**vars(case(0)), "judge": lambda hparams, key: Score(jnp.nan, jnp.nan)})
    assert papers.scored(broken, {}, jax.random.key(0)) == (math.inf, math.inf)


def test_hyperparameters_in_words():
    assert papers_report.in_words({"a": 0.5, "b": np.arange(9.0)}) == "a: 0.5, b: quartiles 2 4 6"


# --- Tree search ------------------------------------------------------------------------------------------


def walked(tree, count, rounds):
    """Lowest loss found where neighbours are alike: |i - best| of two choices."""
    best = math.inf
    for _ in range(rounds):
        i, path = tree.choose((), "i", range(count), True)
        j, path = tree.choose(path, "j", range(count), True)
        loss = abs(i - 11) + abs(j - 4)
        tree.learn(path, loss)
        best = min(best, loss)
    return best


def test_bisection_halves_and_finds_what_is_near():
    tree = mcts.Tree(0)
    value, path = tree.choose((), "i", range(16), True)
    assert len(path) == 4
    assert path[-1] == ("i", value, value + 1)
    assert len(mcts.Tree(0, bisect=False).choose((), "i", range(16), True)[1]) == 1
    found = {
        bisect: np.mean([walked(mcts.Tree(i, bisect), 16, 60) for i in range(30)]) for bisect in (True, False)
    }
    assert found[True] < 0.6 * found[False]


def test_the_highest_bound_is_taken():
    tree = mcts.Tree(0, exploration=1.0)
    for child, loss in ((0, 0.0), (1, 1.0), (1, 0.5)):
        tree.learn((("a", child),), loss)
    bounds = [1 + math.sqrt(2 * math.log(3) / 1), 0.25 + math.sqrt(2 * math.log(3) / 2)]
    assert bounds[0] > bounds[1]
    assert tree.choose((), "a", "xy", False)[0] == "x"
    for _ in range(40):
        tree.learn((("a", 0),), 0.0)
    # log(43): 1 + .43 against .25 + 1.94.
    assert tree.choose((), "a", "xy", False)[0] == "y"


def test_optuna_takes_the_tree_as_a_sampler():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial):
        return abs(trial.suggest_int("i", 0, 15) - 11) + (trial.suggest_categorical("k", ("a", "b")) == "a")

    study = optuna.create_study(sampler=mcts.sampler(0))
    study.optimize(objective, 60)
    assert study.best_value <= 1


# --- Problems ---------------------------------------------------------------------------------------------


def test_one_member_is_its_own_ensemble():
    params = ensemble_decay.start(None, None, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:20], ensemble_decay.split(0)[0])
    one = jax.tree.map(lambda x: x[:1], params)
    np.testing.assert_allclose(
        ensemble_decay.ensemble(one, batch), ensemble_decay.singles(one, batch), rtol=1e-6
    )
    # Jensen: the loss is convex in logits.
    assert ensemble_decay.ensemble(params, batch) < ensemble_decay.singles(params, batch)


def test_the_best_decay_is_the_vertex_of_a_parabola():
    values = (np.log(ensemble_decay.GRID) - math.log(0.02)) ** 2
    np.testing.assert_allclose(ensemble_decay.lowest(values), 0.02, rtol=1e-6)


def test_an_architecture_is_the_network_it_names():
    """Against one written out: two layers of 4 and 8 tanh units, the second with its residual connection."""
    own = architecture.architecture(2, (4, 8), 1, True)
    params = architecture.start({"architecture": own}, None, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (5, 64))
    w, b = params["w"], params["b"]
    first = jnp.pad(jnp.tanh(x @ w[0] + b[0][None])[:, :4], ((0, 0), (0, 60))) + x
    second = jnp.pad(jnp.tanh(first @ w[1] + b[1][None])[:, :8], ((0, 0), (0, 56))) + first
    made = architecture.logits(params, {"architecture": own}, x)
    np.testing.assert_allclose(made, (second @ w[3] + b[3][None])[:, :10], rtol=1e-5)
    assert len(architecture.choices()) == len(set(architecture.choices())) == 930


def test_lookups_end_at_the_lowest_of_the_table():
    rng = np.random.default_rng(0)
    found = dict(zip(architecture.choices(), rng.random(930).tolist(), strict=True))
    best = architecture.looked_up(found, mcts.Tree(0))
    assert best.shape == (architecture.LOOKS,)
    assert (np.diff(best) <= 0).all()
    assert min(found.values()) <= best[-1] < np.quantile(list(found.values()), 0.2)


def test_exact_models_are_sampled_exactly_at_weights_of_one():
    """The noise predictions are those of the distributions; so the weights 1, 1 are the best there are."""
    x = jax.random.normal(jax.random.key(0), (3, 2))
    share, centres = 0.6, guidance.CENTRES[:2]

    def log_density(x):
        variance = share * guidance.WIDTH**2 + 1 - share
        square = jnp.sum((x[None] - jnp.sqrt(share) * centres) ** 2, -1)
        return jax.nn.logsumexp(-square / (2 * variance))

    score = jax.vmap(jax.grad(log_density))(x)
    made = guidance.noise(x, share, centres, guidance.WIDTH)
    np.testing.assert_allclose(made, -jnp.sqrt(1 - share) * score, rtol=1e-6)

    own, steps = guidance.problem(off=np.zeros(2, np.float32)), len(guidance.SHARES) - 1
    begin = jax.random.normal(jax.random.key(1), (400, 2))
    fn = jax.jit(bilevel.hypergradient(own, bilevel.unrolled(None, steps, remat=False)))
    times = bilevel.stacked(guidance.TIMES)
    at_one = fn(begin, guidance.weights(1.0, 1.0), times, guidance.wanted(0, 0))
    elsewhere = fn(begin, guidance.weights(1.5, 0.6), times, guidance.wanted(0, 0))
    assert 0 < at_one.value < 0.01
    assert elsewhere.value > 10 * at_one.value
    assert elsewhere.grad["own"] < 0
    assert abs(at_one.grad["own"]) < 0.1 * abs(elsewhere.grad["own"])
