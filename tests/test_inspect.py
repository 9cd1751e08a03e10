"""What files say of a run, without its code, without a device, and while it goes on."""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_results import result as made

import bilevel
from bilevel import archive, checkpoint, inspection, panels, stored
from bilevel.checkpoint import Folder, checkpoints
from bilevel.problem import Status


def inner(w, h, x):
    return 0.5 * jnp.sum((w - x) ** 2) + 0.5 * jnp.sum(jnp.exp(h["log"]) * w**2) + h["pair"][0] * jnp.sum(w)


def outer(w, h, x):
    return jnp.sum((w - x) ** 2), {"size": jnp.sum(w**2)}


PROBLEM = bilevel.Problem(inner, outer, constraints={"pair": [bilevel.real(), bilevel.fixed()]})
METHOD = bilevel.alternating(bilevel.one_step(), optax.sgd(0.1), optax.sgd(0.1))


def run(hparams, w, path, steps, **options):
    return bilevel.optimize(
        PROBLEM, w, hparams, np.ones(40), np.full(40, 0.5), METHOD, steps, test=np.full(40, 0.4),
        checkpoint=bilevel.checkpoints(path, every=4, keep=2), judge_every=2, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A single run, and a population that was halved, one member of which had a nan from the start."""
    root = tmp_path_factory.mktemp("runs")
    one = {"log": np.linspace(-1, 1, 40), "pair": [np.array(0.1), np.array(0.2)]}
    many = jax.tree.map(lambda x: np.stack([x, x + 1, x - 1, x - 0.5]), one)
    params = np.zeros((4, 40)) + np.array([0, np.nan, 0, 0])[:, None]
    found = {
        "single": run(one, np.zeros(40), root / "single", 10),
        "population": run(
            many, params, root / "population", 10, population=bilevel.population(4, halve_every=6)
        ),
    }
    return root, found


def newest(folder):
    return folder / sorted(name for name in os.listdir(folder) if name.endswith(".npz"))[-1]


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", ["single", "population"])
def test_a_checkpoint_is_the_run(folders, kind):
    root, results = folders
    expected = results[kind]
    with archive.File(newest(root / kind)) as file:
        got = stored.of_checkpoint(file)
    same(got.history, expected.history)
    same(got.trajectory.steps, expected.trajectory.steps)
    assert got.trajectory.quantiles == expected.trajectory.quantiles
    for mine, theirs in (
        (got.hparams, expected.hparams),
        (got.best.hparams, expected.best.hparams),
        (got.trajectory.hparams, expected.trajectory.hparams),
    ):
        same(jax.tree.leaves(mine), jax.tree.leaves(theirs))
        assert [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(mine)] == [
            "['log']", "['pair'][0]", "['pair'][1]"
        ]  # fmt: skip
    assert (got.best.value, got.best.step) == (expected.best.value, expected.best.step)
    assert got.best.member == expected.best.member
    assert got.best.params is None
    if kind == "population":
        same(got.members.value, expected.members.value)
        same(got.members.step, expected.members.step)
        same(got.members.attempted, expected.members.attempted)
        ended = np.asarray(expected.status) != Status.BUDGET
        same(np.asarray(got.status)[ended], np.asarray(expected.status)[ended])
        assert (np.asarray(got.status)[~ended] == Status.RUNNING).all()
        assert set(ended) == {True, False}
        assert got.message == f"{(~ended).sum()} of 4 members had not ended."
    else:
        assert (got.status, got.message) == (Status.RUNNING, "All outer steps were done.")


def test_it_is_told(folders):
    root, results = folders
    seen, best = inspection.look(root / "single"), results["single"].best
    text = str(seen)
    assert text.splitlines()[0] == f"{newest(root / 'single')}: a checkpoint after 10 of 10 outer steps"
    facts = dict(seen.facts)
    assert facts["files"] == "step-00000008.npz, step-00000010.npz"
    assert facts["process"] == "none: the run has ended or was interrupted"
    assert facts["value"].startswith(f"best {best.value:.6g} at step {best.step}, last ")
    assert facts["test"].endswith(" at step 8")
    log, pair = results["single"].hparams["log"], results["single"].hparams["pair"]
    assert facts["hparams['log'] 40"].endswith(
        f"{log.min():.4g} .. {np.median(log):.4g} .. {log.max():.4g} last"
    )
    assert facts["hparams['pair'][1]"] == "0.2 first, 0.2 best, 0.2 last"
    assert facts["hparams['pair'][0]"].endswith(f", {pair[0]:.4g} last")
    assert f"jax {jax.__version__}" in facts["versions"]
    assert facts["go on"].startswith(
        f"bilevel.optimize(..., checkpoint={str(root / 'single')!r}) with the same"
    )
    every = dict(inspection.look(root / "population").facts)
    assert every["status"] == "members: 2 RUNNING, 1 DIVERGED, 1 DROPPED"
    assert f"of member {results['population'].best.member}" in every["value"]


def test_a_run_that_goes_on_is_left_alone(folders, tmp_path):
    content = newest(folders[0] / "single").read_bytes()
    with Folder(checkpoints(tmp_path)):
        (tmp_path / "step-00000010.npz").write_bytes(content)
        (tmp_path / "step-00000012.npz").write_bytes(content[:-100])  # half of one
        before = {name: (tmp_path / name).stat() for name in os.listdir(tmp_path)}
        seen = inspection.look(tmp_path)
        after = {name: (tmp_path / name).stat() for name in os.listdir(tmp_path)}
    assert {n: (s.st_mtime_ns, s.st_size) for n, s in before.items()} == {
        n: (s.st_mtime_ns, s.st_size) for n, s in after.items()
    }
    facts = dict(seen.facts)
    assert facts["process"] == f"{os.getpid()} used it last, and is alive"
    assert facts["damaged"] == "step-00000012.npz; an older one is shown"


def test_a_file_that_is_removed_meanwhile(folders, tmp_path, monkeypatch):
    (tmp_path / "step-00000008.npz").write_bytes(newest(folders[0] / "single").read_bytes())
    names = checkpoint.files
    monkeypatch.setattr(checkpoint, "files", lambda path: [*names(path), "step-00000009.npz"])
    assert "step-00000008.npz: a checkpoint" in inspection.look(tmp_path).heading


def test_a_checkpoint_without_names(folders, tmp_path):
    trees, meta = archive.read(newest(folders[0] / "single"))
    meta.pop("shown", None)
    archive.write(tmp_path / "step-00000010.npz", trees, meta)
    seen = inspection.look(tmp_path)
    assert "a checkpoint after 10 outer steps" in seen.heading
    assert "no values can be shown" in dict(seen.facts)["names"]
    with pytest.raises(ValueError, match="kept no names: it cannot be drawn"):
        seen.known()


def test_hyperparameters_keep_their_names_whatever_their_order(tmp_path):
    def inner_of(w, h, x):
        return 0.5 * jnp.sum((w - x) ** 2) + 0.5 * jnp.exp(h.rate) * jnp.sum(jnp.exp(h.decay) * w**2)

    problem = bilevel.Problem(inner_of, lambda w, h, x: jnp.sum((w - x) ** 2))
    given = Own(np.array(-1.0), np.array([2.0, 3.0]))
    path = bilevel.checkpoints(tmp_path, every=4)
    data = np.ones(2), np.full(2, 0.5)
    result = bilevel.optimize(
        problem, np.zeros(2), given, *data, METHOD, 4, checkpoint=path, judge_every=2, progress=False
    )
    for found in panels.leaves(inspection.look(tmp_path).known()):
        name = found.name.strip("[']")
        np.testing.assert_array_equal(found.start, getattr(given, name))
        np.testing.assert_array_equal(found.last, getattr(result.hparams, name))


# --- Results ------------------------------------------------------------------------------------------------


class Own(NamedTuple):
    rate: np.ndarray
    decay: np.ndarray


@pytest.mark.parametrize("members", [None, 3])
def test_a_result_of_any_containers(tmp_path, members):
    expected = made(lambda t, m=0: Own(np.array(0.1 + t + m), np.full((2, 3), t)), members)
    expected.save(tmp_path / "run.npz")
    seen = inspection.look(tmp_path / "run.npz")
    got = seen.known()
    same(got.history, expected.history)
    same(got.best.hparams, list(expected.best.hparams))
    assert got.params["w"] == jax.ShapeDtypeStruct(expected.params["w"].shape, np.float64)
    assert (got.message, got.seconds) == (expected.message, expected.seconds)
    assert dict(seen.facts)["load"] == f"result = bilevel.load({str(tmp_path / 'run.npz')!r})"
    assert dict(seen.facts)["message"] == expected.message


# --- Nothing there ------------------------------------------------------------------------------------------


def refused(path, words):
    with pytest.raises(ValueError, match=words) as caught:
        inspection.look(path)
    assert "\n" not in str(caught.value)


def test_nothing_that_is_whole(tmp_path, monkeypatch):
    refused(tmp_path / "no", "there is no file .*no")
    refused(tmp_path, "holds no checkpoint: it is not a folder that was given as checkpoint=")
    with Folder(checkpoints(tmp_path)):
        refused(
            tmp_path, f"no checkpoint yet: process {os.getpid()} has begun a run there; the first comes after"
        )
    (tmp_path / "lock").write_text("1234567\n")
    monkeypatch.setattr(inspection, "_alive", lambda process: False)
    refused(tmp_path, "process 1234567 began a run there and was killed before the first")
    (tmp_path / "lock").write_text("")
    (tmp_path / ".step-00000050.npz.abcdabcd.tmp").write_bytes(b"PK")
    refused(tmp_path, "only half of one, whose writer was killed")
    (tmp_path / "step-00000050.npz").write_bytes(b"PK")
    refused(tmp_path, r"every checkpoint is damaged \(step-00000050.npz\)")
    refused(tmp_path / "step-00000050.npz", "is not a file that bilevel wrote, or it is damaged")


def test_other_files(tmp_path):
    archive.write(tmp_path / "a.npz", {"x": np.ones(2)}, {"kind": "schedule"})
    refused(tmp_path / "a.npz", "holds a schedule, neither a result nor a checkpoint")
    refused(tmp_path, "if a.npz is a saved result, name that file")
    archive.write(tmp_path / "b.npz", {"x": np.ones(2)}, {})
    refused(tmp_path / "b.npz", "b.npz is not a result that bilevel wrote")
    np.savez(tmp_path / "c.npz", x=np.ones(2))
    refused(tmp_path / "c.npz", "its digest is not that of its content")


def test_processes_are_asked_gently():
    assert inspection._alive(os.getpid()) is True
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert inspection._alive(child.pid) is False


# --- The command --------------------------------------------------------------------------------------------

COMMAND = """
import sys
from bilevel.cli import main
code = main(sys.argv[1:])
from jax._src import xla_bridge
sys.exit(code or 10 * xla_bridge.backends_are_initialized())
"""


def test_the_command_needs_no_device(folders):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMAND, "inspect", folders[0] / "single"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"value +best", done.stdout)
