"""The loop of the experiments: all learn from the same noise, and are judged at the same steps."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # comes with the demo

from skiparse.bench.experiments import learn, outcome, sparsity


class Told(learn.Learner):
    """Writes down what is asked of it, and learns nothing."""

    def __init__(self, told, name):
        self.scenes = SimpleNamespace(latents=torch.zeros(3, 2, 1, 2, 2))
        self.told, self.name, self.curve = told, name, []

    def before(self, step):
        self.told.append((self.name, "before", step))

    def step(self, step, rate, sigmas, noise):
        self.told.append((self.name, "step", step, rate, sigmas.clone(), noise.clone()))

    def judge(self, step):
        self.told.append((self.name, "judge", step))
        self.curve.append({"step": step, "loss": 0.0})


def walked(**options):
    told = []
    learners = {name: Told(told, name) for name in "ab"}
    learn.side_by_side(learners, 5, rate=lambda step: step / 10, every=2, **options)
    return told


def test_they_take_turns():
    told = [each[:3] for each in walked()]
    expected = [(name, "judge", 0) for name in "ab"]
    for step in range(1, 6):
        expected += [(name, what, step) for name in "ab" for what in ("before", "step")]
        expected += [(name, "judge", step) for name in "ab"] if step in (2, 4, 5) else []
    assert told == expected


def test_the_noise_is_the_same_for_all_and_another_in_every_step():
    steps = [each for each in walked(noises=2) if each[1] == "step"]
    for (_, _, step, rate, *one), (_, _, _, _, *two) in zip(steps[::2], steps[1::2], strict=True):
        assert rate == step / 10
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
        assert one[0].shape == (3,)
        assert one[1].shape == (2, 3, 2, 1, 2, 2)
    assert len({noise.sum().item() for *_, noise in steps}) == 5
    again = [each for each in walked(noises=2) if each[1] == "step"]
    assert all(torch.equal(x[-1], y[-1]) for x, y in zip(steps, again, strict=True))
    other = [each for each in walked(noises=2, seed=2) if each[1] == "step"]
    assert not torch.equal(steps[0][-1], other[0][-1])


def test_rates():
    assert [learn.rising(step, top=2, over=4) for step in (1, 4, 9)] == [0.5, 2, 2]
    found = [learn.rising_and_falling(step, 10, top=2, over=4) for step in (2, 10)]
    assert found == pytest.approx([0.82, 0.2])


def test_the_conversion_is_between_two_steps(monkeypatch):
    monkeypatch.setattr(sparsity.SUV, "from_dense", lambda model, *, sparsity: (model, sparsity))
    learner = object.__new__(sparsity.Converted)
    learner.after, learner.sparsity, learner.model = 3, (1, 2, 1), "dense"
    learner.go_on_as = lambda model: setattr(learner, "model", model)
    seen = []
    for step in range(1, 7):
        learner.before(step)
        seen.append(learner.model)
    assert seen == ["dense"] * 3 + [("dense", (1, 2, 1))] * 3


def test_a_report_and_its_picture(tmp_path):
    figure = Figure()
    axes = figure.add_subplot()
    curve = [{"step": 0, "loss": 2.0}, {"step": 4, "loss": 1.0}]
    outcome.plot(axes, curve, "step", "loss", label="it", colour="#123456")
    outcome.finish(axes, "steps", "loss")
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 4], [2.0, 1.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["it"]
    found = outcome.report(("how\n", "more"), {"steps": 4}, {"it": {"curve": curve}})
    assert (found["method"], found["runs"]["it"]["curve"]) == ("how\n\nmore", curve)
    picture = outcome.write(tmp_path, "it", found, outcome.png(figure))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
