"""People's blind votes between version and baseline, as they stand in the log.

Owns the unit: the rater where enough raters are known, else the prompt. Such an interval describes
the votes that there are; nobody fixed beforehand how many there would be. Event loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from heedful_trainer.evaluation import log
from heedful_trainer.evaluation.figures import Figure, win_rate
from heedful_trainer.evaluation.section import Context, Section, Skipped

_MIN_RATERS = 6
TITLE = "Win rate: people's blind votes"


async def votes(context: Context) -> Section:
    """Return how often people preferred the version.

    Raises:
        Skipped: there is no vote between the two.
    """
    asker = context.asker
    if not asker.compares:
        raise Skipped("version and baseline are the same policy")
    found: list[log.Vote] = []
    programs = 0
    async for item in log.read(asker.client, ("ranking",), completions=True):
        vote = log.vote_of(item, asker.version, asker.baseline)
        if vote is not None and log.is_person(item.record.event):
            found.append(vote)
        programs += vote is not None and not log.is_person(item.record.event)
    unused = f"not counted: {programs} by simulated raters or judges"
    if not found:
        asked = f"heedful models diff {asker.version} {asker.baseline} --vote"
        nobody = f"nobody voted between {asker.version} and {asker.baseline}: {asked}"
        raise Skipped(f"{nobody} ({unused})" if programs else nobody)
    return Section(
        "votes",
        TITLE,
        "done",
        figures=(figure_of(found),),
        notes=(
            "Counts of the votes so far; not a proof.",
            *((f"{unused.capitalize()}.",) if programs else ()),
        ),
    )


def figure_of(found: Sequence[log.Vote]) -> Figure:
    """Return the win rate of some votes, at least one."""
    raters = {vote.rater for vote in found} - {""}
    by_rater = len(raters) >= _MIN_RATERS
    units = [vote.rater if by_rater and vote.rater else vote.prompt for vote in found]
    outcomes = [vote.outcome for vote in found]
    estimate, tests = win_rate(units, outcomes)
    wins, ties = outcomes.count(1.0), outcomes.count(0.5)
    people = f"{len(raters)} named raters" if raters else "raters not named"
    return Figure(
        "people prefer the version",
        "share",
        "higher",
        estimate,
        reference=0.5,
        detail=(
            f"{wins} won, {len(found) - wins - ties} lost, {ties} tied; {people}; n counts "
            f"{'raters' if by_rater else 'prompts'}; p = {tests.p_better:.3g}"
        ),
    )
