"""A training that saves every step in the background is killed at random moments, a thousand times, and goes on each time.

    python soak/kill_training.py [--short] [--kills 1000] [--most-ms 300]

The training is the small one of ``tests/trainings.py``, in which every kind of state matters (accumulated gradients, a
scheduler, a scaler, moving averages, a shuffled loader, four random generators). An oracle trains once without a stop,
and notes loss and weights of each step. Then children that are forked from a process with torch imported restore the
newest step, compare every weight with the oracle's of that step, bit for bit, and train on, comparing each loss and
each weight with the oracle's, and saving each step (``wait=False``, with metrics, ``keep=Latest(3)``), until SIGKILL
comes, or the training ends; then another begins in a new folder. A step whose handle had said that it is durable must
be there.

It proves that what a killed training leaves is a step of that training and no other, and that going on from it is as if
nothing had been. It proves nothing about power cuts (``power_cut.py``), and the moments are random:
``kill_at_calls.py`` meets every call. The seed gives the delays again, not what the machine does in them.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trial import Forked, Impossible, Tally, carry_out, options

from statedict.runs.policies import Latest
from statedict.runs.training_run import TrainingRun

KEPT = 3
# Milliseconds between a child's beginning and its end, at most: so that some die in their restore, and some near the end of training.
MOST_MS = 300.0
Report = Callable[[str], None]


class Oracle(NamedTuple):
    """What the training that wasn't stopped has come to: by step, from 1 on."""

    losses: list[float]
    weights: list[list[Any]]

    def wrong_weights(self, step: int, weights: list[Any]) -> str:
        """What is wrong with these weights of a step."""
        pairs = zip(self.weights[step - 1], weights, strict=True)
        same = all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)
        return "" if same else f"weights of step {step} aren't the oracle's"


class Life:
    """One child: it restores, compares, and trains on until it is ended."""

    def __init__(self, trainings: Any, oracle: Oracle, folder: Path, seed: int) -> None:
        self._trainings = trainings
        self._oracle = oracle
        self._folder = folder
        self._seed = seed

    def work(self, report: Report) -> None:
        """Say ``restored N``, ``durable N`` and ``finished``; ``wrong …`` where anything differs from the oracle."""
        # Another seed than the oracle's: nothing is right by chance.
        training = self._trainings.make(self._seed)
        state = self._trainings.state_of(training)
        with TrainingRun(self._folder, keep=Latest(KEPT)) as run:
            restored = run.restore(state)
            step = 0 if restored is None else restored.step
            if restored is None:
                # What the oracle began with.
                training = self._trainings.make(1)
                state = self._trainings.state_of(training)
            else:
                self._say(report, self._oracle.wrong_weights(step, training.weights))
                self._say(report, "a newer step was damaged" if restored.fell_back else "")
                self._say(report, "" if restored.metrics["loss"] == self._oracle.losses[step - 1] else "another metric")
            report(f"restored {step}")
            self._train(report, run, training, state)
        report("finished")

    def _train(self, report: Report, run: TrainingRun, training: Any, state: Any) -> None:
        under_way: list[Any] = []

        def after(step: int) -> None:
            self._say(report, self._oracle.wrong_weights(step, training.weights))
            under_way.append(run.save(step, state, metrics={"loss": self._oracle.losses[step - 1]}, wait=False))
            for saved in [each for each in under_way if each.is_done]:
                under_way.remove(saved)
                report(f"durable {saved.step}" if saved.durable else f"wrong step {saved.step} failed")

        first = state.step
        losses = self._trainings.train(training, state, after=after)
        self._say(report, "" if losses == self._oracle.losses[first:] else "the losses aren't the oracle's")

    def _say(self, report: Report, wrong: str) -> None:
        if wrong:
            report(f"wrong {wrong}")


def oracle_of(trainings: Any) -> Oracle:
    """The training without a stop."""
    training = trainings.make(1)
    weights: list[list[Any]] = []
    losses = trainings.train(
        training, trainings.state_of(training), after=lambda step: weights.append(training.weights)
    )
    return Oracle(losses, weights)


def wrong_life(code: int, lines: list[str], durable: int, *, killed: bool) -> str:
    """What is wrong with what a child has said. ``durable``: the newest step that was called so before it began."""
    wrong = [line for line in lines if line.startswith(("wrong", "raised"))]
    if wrong:
        return wrong[0]
    if code not in ((0, -9) if killed else (0,)):
        return f"it ends with {code}: {lines[-1:]}"
    restored = [int(line.split()[1]) for line in lines if line.startswith("restored")]
    if restored and restored[0] < durable:
        return f"step {durable} was durable, and {restored[0]} is the newest"
    return ""


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """Kills until there were enough."""
    try:
        import torch
    except ImportError as error:
        raise Impossible("torch isn't installed") from error
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import trainings

    torch.set_num_threads(1)
    chance = random.Random(chosen.seed)
    oracle = oracle_of(trainings)
    kills = 8 if chosen.short else chosen.kills
    finished = steps = early = resumed = number = durable = 0
    while tally.states < kills:
        number += 1
        life = Life(trainings, oracle, folder / "run", number + 1)
        child = Forked(life.work)
        time.sleep(chance.uniform(0, chosen.most_ms / 1e3))
        child.kill()
        code, lines = child.lines()
        wrong = wrong_life(code, lines, durable, killed=True)
        said = [int(line.split()[1]) for line in lines if line.startswith("durable")]
        durable, steps = max([durable, *said]), steps + len(said)
        early += not any(line.startswith("restored") for line in lines)
        resumed += any(line.startswith("restored") and line != "restored 0" for line in lines)
        if code == -9:
            tally.add(f"kill {number}", wrong)
        elif wrong:
            tally.add(f"life {number}, which wasn't killed", wrong)
        if code == 0 or wrong:
            finished += 1
            shutil.rmtree(folder / "run", ignore_errors=True)
            durable = 0
    code, lines = Forked(Life(trainings, oracle, folder / "run", 0).work).lines()
    tally.add("the last life, to the end", wrong_life(code, lines, durable, killed=False))
    tally.note(f"{resumed:,} restores compared and gone on from, {early:,} kills before a restore was done")
    tally.note(f"{steps:,} saves called durable, {finished:,} trainings to their end")


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--most-ms", type=float, default=MOST_MS, help="between a child's beginning and its end")
    carry_out(parser, trial)
