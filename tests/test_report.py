"""The page of a result: it holds everything, and nothing that is not text."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest
from made_results import STEPS, history, result

from bilevel import diagnosis, result_report
from bilevel.problem import Status


class Page(html.parser.HTMLParser):
    """Text by kind of element, and what an element refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources = [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.sources += [v for name, v in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append((tag, named.get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, kind in self.open:
            for key in {tag, kind} - {""}:
                self.texts.setdefault(key, []).append(data)

    def facts(self):
        """The summary and the work, by name."""
        cells = [t for t in self.texts["table"] if t.strip()]
        return dict(zip(cells, cells[1:], strict=False))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing takes long, and is tested elsewhere."""
    monkeypatch.setattr(result_report, "_pictures", lambda result: ([], []))


SCALAR = result(
    lambda t: {"<l2>": np.array(1 - t), "pair": np.array([t, 2.0]), "many": np.linspace(0, 1 + t, 50)}
)


def test_it_is_one_file_with_its_pictures(tmp_path, monkeypatch):
    monkeypatch.undo()
    result(lambda t: np.array(t)).report(tmp_path / "run.html", title="<b>", notes={"method": "a < b & c"})
    text = (tmp_path / "run.html").read_text()
    page = Page(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert "http" not in text
    assert "<script" not in text
    assert page.texts["title"] == page.texts["h1"] == ["<b>"]
    assert page.facts()["method"] == "a < b & c"
    assert [file.name for file in tmp_path.iterdir()] == ["run.html"]


def test_numbers_of_a_run():
    tested = {"last": {"value": 0.3, "accuracy": 0.7}, "best": {"value": 0.25, "accuracy": 0.8}}
    given = dataclasses.replace(SCALAR, test=tested, message="All done: <b>.")
    page = Page(result_report.page(given, "run", {}))
    facts = page.facts()
    assert page.texts["status good"] == ["BUDGET"]
    assert "warning" not in page.texts
    assert facts["outer steps"] == str(STEPS)
    assert facts["best value"] == f"{given.best.value:.6g} at step {STEPS - 1}"
    assert facts["last value"] == f"{given.history['value'][-1]:.6g}"
    assert (facts["test value, best pair"], facts["test accuracy, best pair"]) == ("0.25", "0.8")
    assert facts["hyperparameters"] == "53 in 3 arrays (float64)"
    assert facts["examples touched by cross products"] == "4,000"
    assert facts["residual it left"] == "0.001 (median), 0.001 (largest)"
    rows = page.texts["tbody"]
    assert rows[:5] == ["hparams['<l2>']", "number", "1", "0.025", "0"]
    assert rows[5:10] == ["hparams['many']", "50", "0 .. 0.5 .. 1", "0 .. 0.9875 .. 1.975", "0 .. 1 .. 2"]
    assert rows[10:] == ["hparams['pair']", "2", "0, 2", "0.975, 2", "1, 2"]
    assert "All done: <b>." in " ".join(page.texts["p"])
    assert "bilevel.load" in "".join(page.texts["pre"])


def overfitted():
    test = np.where(np.arange(STEPS) % 5 == 0, np.abs(np.arange(STEPS) - 10) / 20 + 0.3, np.nan)
    columns = {"test": test, "nonfinite": (np.arange(STEPS) == 7).astype(int), "error": np.full(STEPS, 0.6)}
    given = result(lambda t: np.array(t), columns=columns)
    _, advice, _ = diagnosis.final(Status.BUDGET, given.history, False, False)
    assert len(advice) == 2
    return dataclasses.replace(given, message=" ".join(["All done.", *advice])), advice


def test_what_deserves_attention_stands_out():
    given, advice = overfitted()
    page = Page(result_report.page(given, "run", {}))
    assert page.texts["warning"][:2] == advice
    assert page.texts["warning"][2].startswith("1 of 40 outer steps met numbers that are not finite")
    assert page.texts["p"][:2] == ["BUDGET", " All done."]
    assert sum("overfit" in text for text in page.texts["p"]) == 0
    apart = dataclasses.replace(
        SCALAR, test={"last": {"value": 1.0}, "best": {"value": 2 * SCALAR.best.value}}
    )
    assert "the test value is 100 % above the validation value" in result_report.warnings_of(apart)[0]
    failed = dataclasses.replace(SCALAR, status=Status.DIVERGED, message="Outer step 3: no.")
    assert Page(result_report.page(failed, "run", {})).texts["status bad"] == ["DIVERGED"]


def test_a_population_has_a_table_of_members():
    given = result(lambda t, m: {"l2": np.array(t + m)}, members=3)
    status = np.array([2, 3, 7], np.int32)
    tested = {"last": {"value": np.arange(3.0)}, "best": {"value": 0.25}}
    members = dataclasses.replace(
        given.members,
        messages=("fine", "<nan>", "dropped"),
        value=np.array([0.5, np.nan, 0.25]),
        test={"best": {"value": np.arange(3.0)}, "last": {"value": np.arange(3.0)}},
    )
    page = Page(
        result_report.page(dataclasses.replace(given, status=status, members=members, test=tested), "run", {})
    )
    assert page.texts["status good"] == ["1 of 3 BUDGET", "1 of 3 DROPPED"]
    assert page.texts["status bad"] == ["1 of 3 DIVERGED"]
    assert page.texts["warning"] == ["1 of 3 members diverged."]
    assert page.facts()["members"] == "3"
    rows = page.texts["tbody"][5:]
    assert rows == [
        "2", "DROPPED", "0.25", str(STEPS - 1), "2", "dropped",
        "0", "BUDGET", "0.5", str(STEPS - 1), "0", "fine",
        "1", "DIVERGED", "nan", str(STEPS - 1), "1", "<nan>",
    ]  # fmt: skip
    assert page.texts["best"] == rows[6:12]  # the member whose pair is the best of the result


def test_a_run_of_no_steps_and_long_tables():
    nothing = {name: column[:0] for name, column in history(np.ones(3)).items()}
    page = Page(result_report.page(dataclasses.replace(SCALAR, history=nothing), "run", {}))
    assert page.facts()["outer steps"] == "0"
    many = result(lambda t: [np.array(t)] * 205)
    text = result_report.page(many, "run", {})
    assert "5 more are not listed" in text
    assert "hparams[199]" in text
    assert "hparams[200]" not in text


def test_where_it_cannot_be_written(tmp_path):
    for path, words in (
        (tmp_path / "no" / "run.html", "no does not exist; create it"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            SCALAR.report(path)
