"""Experiments as files: what they say is what is planned."""

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean

import pytest

from loadtest.adapters import CatalogError
from loadtest.experiment import experiment_names, read_experiment
from loadtest.plan import RunPlan, Stage
from loadtest.prompts import Prompts
from loadtest.schedule import arrival_times, model_choice

ADAPTERS = [f"m/{number}" for number in range(1000)]


@pytest.mark.parametrize("name", experiment_names())
def test_every_packaged_experiment_can_be_planned_also_short(name: str) -> None:
    experiment = read_experiment(name)
    titles = [stage.title for stage in experiment.stages("m", ADAPTERS)]
    assert titles and len(set(titles)) == len(titles)
    assert all(stage.adapters <= 3 for stage in experiment.shortened(3).stages("m", ADAPTERS[:3]))


def test_paper_baseline_is_the_papers_load() -> None:
    experiment = read_experiment("paper-baseline")
    assert (experiment.input_tokens, experiment.output_tokens) == ((30, 500), (1, 120))
    assert (experiment.seconds, experiment.think_seconds, experiment.users[-1]) == (120, 0, 100)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("users = [1]\nspeed = 2", "unknown field `speed`"),
        ("", "either users"),
        ("users = [1]\nrates = [1]", "either users"),
        ("users = [0]", "users must be from 1"),
        ("users = [1]\noutput_tokens = [9, 3]", "output_tokens must be"),
        ('users = [1]\npopularity = "weights"', "weights go with"),
        ("users = [1", "experiment"),
    ],
)
def test_wrong_file_is_refused_by_what_is_wrong(tmp_path: Path, lines: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'about = "x"\nadapters = ["base"]\n{lines}\n')
    with pytest.raises(CatalogError, match=says):
        read_experiment(str(file))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CatalogError, match="paper-adapters"):
        read_experiment("nothing")


def test_too_few_adapters_are_said() -> None:
    with pytest.raises(CatalogError, match="wants 25 adapters of m; the server offers 3"):
        read_experiment("paper-adapters").stages("m", ADAPTERS[:3])


def test_hot_adapter_is_drawn_by_its_weight_and_the_last_weight_holds_on() -> None:
    assert read_experiment("fairness").weights_of(4) == (24, 1, 1, 1)
    stage = Stage("3 adapters", 1, ("hot", "a", "b"), 3, (8.0, 1.0, 1.0))
    plan = RunPlan(
        run="r", base_url="u", endpoint="chat", model="m", stages=(stage,), stage_seconds=1, ramp_seconds=0
    )
    drawn = Counter(islice(model_choice(plan, stage), 5000))
    assert drawn["hot"] / 5000 == pytest.approx(0.8, abs=0.03)
    assert list(islice(model_choice(plan, stage), 50)) == list(islice(model_choice(plan, stage), 50))


def test_schedules_have_their_rate_and_their_kind_of_gaps() -> None:
    constant = arrival_times("constant", 10, 2, "s")
    assert constant == pytest.approx([0.1 * number for number in range(1, 20)])
    poisson = arrival_times("poisson", 50, 100, "s")
    gaps = [b - a for a, b in pairwise(poisson)]
    assert len(poisson) == pytest.approx(5000, rel=0.05)
    assert mean(gap > 0.02 for gap in gaps) == pytest.approx(0.368, abs=0.03)
    assert poisson == arrival_times("poisson", 50, 100, "s") != arrival_times("poisson", 50, 100, "t")


def test_lengths_are_drawn_within_their_bounds_and_prefixes_belong_to_their_owner() -> None:
    lengths = {len(Prompts("words", 30, 0, "n", most=60).text(index).split()) for index in range(300)}
    assert min(lengths) == 30 and max(lengths) == 60
    shared = Prompts("words", 10, 0, "n", shared_tokens=20)
    openings = {owner: shared.text(7, owner).split()[:20] for owner in ("a", "b")}
    assert shared.text(8, "a").split()[:20] == openings["a"] != openings["b"]
    assert shared.text(8, "a") != shared.text(7, "a")
