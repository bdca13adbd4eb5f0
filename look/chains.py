"""Read the chains of thought of a ladder: is what they reckon right, is what they see true?

    python -m look.chains runs/tiny

The rungs that think were asked about rooms whose true chains are known. A chain may be wrong in two
ways. Reckoning: a step does not follow from the words before it. Sight: a thing stands elsewhere.

    lamp 33 45 bed 21 27: right 12 back 18: 22 apart: 5.5

Shares of all chains, that is, of the well-formed completions:

in form   has the steps of its type of question (rooms/reckon.py)
asked     has the form, and states facts of just the things of the true chain, in order
whole     has the form, and every step follows, even if its facts are of other things

Shares within the chains in form:

steps     of ways, distances, hours, turns and results: those that follow from the words before
answer    of answers: those that are the chain's result, or the letter of it
places    of places of things of the true chain: those within half a meter of the true ones
lengths   of sides of things and of rooms: those within a tenth of the true ones
pictures  of first pictures that show a thing: those that are the true ones

A chain that counts wrongly is not *asked*: it has a fact too many or too few.
"""

import math
import re
from collections import namedtuple
from pathlib import Path

from benchmarks import chosen_text
from files import CONFIG, UserError, read_json, read_jsonl, text_table
from ladder import COLDSTART, RUNGS
from rewards import WELL_FORMED, is_well_formed
from rooms import reckon
from rooms.reckon import Fact
from runtime import main_guard
from settings import Parser

SHARES = ("in form", "asked", "whole", "steps", "answer", "places", "lengths", "pictures")
FEW_SHARES = ("asked", "whole", "places")  # for a short table
NEAR = 0.5 / reckon.UNIT  # half a meter on the map

NAME = "[a-z]+"
NUMBER = "[0-9]{1,4}"
FIRST = f"{NAME} {NUMBER}"
PLACE = f"{NAME} {NUMBER} {NUMBER}"
COUNTED = f"{NUMBER} {PLACE}"
SIDES = f"{NAME} {NUMBER} {NUMBER} {NUMBER}"
WAY = f"{PLACE} {PLACE}: (?:left|right) {NUMBER} (?:front|back) {NUMBER}"
APART = f"{WAY}: {NUMBER} apart"
AT = f"{WAY}: at {NUMBER}"
READ_WAY = f"(left|right) ({NUMBER}) (front|back) ({NUMBER})(?:: (?:at )?({NUMBER}))?"
RESULT = "([0-9.]+|[a-z, -]+)(?: [A-D])?"  # a number, or words and a letter
SIGNS = {"left": -1, "right": 1, "front": -1, "back": 1}
HERE = Fact("here", (0, 0))  # a way is written as the place that it leads to from here

# patterns of the steps before the result, and of a fact; the share that its facts count for
Form = namedtuple("Form", "steps fact counts_for")
FORMS = {  # by question type
    "object size": Form(SIDES, SIDES, "lengths"),
    "room size": Form(PLACE, PLACE, "lengths"),  # walls are written like a place
    "appearance order": Form(rf"{FIRST}(?:\. {FIRST})*", FIRST, "pictures"),
    "object count": Form(rf"{COUNTED}(?:\. {COUNTED})*", PLACE, "places"),
    "absolute distance": Form(APART, PLACE, "places"),
    "relative distance": Form(rf"{APART}(?:\. {APART})*", PLACE, "places"),
    # seen from a thing, or from the camera
    "relative direction": Form(rf"{AT}\. {AT}: turn {NUMBER}|{WAY}", PLACE, "places"),
}
OF_FACTS = {  # steps and result follow from the facts at once
    "object size": reckon.longest,
    "room size": reckon.floor,
    "appearance order": reckon.order,
    "object count": reckon.total,
}
Chain = namedtuple("Chain", "steps facts result")


# ---------------------------------------------------------------------------------- one chain


def read_chain(form, text):
    """A chain without its letter, or None where it does not have the form.

    >>> read_chain(FORMS["room size"], "room 18 21: 24")
    Chain(steps='room 18 21', facts=[Fact(name='room', numbers=(18, 21))], result='24')
    """
    match = re.fullmatch(f"({form.steps}): {RESULT}", text.strip())
    if match is None:
        return None
    steps, result = match.groups()
    facts = []
    for words in re.findall(form.fact, steps):
        name, *numbers = words.split()
        facts.append(Fact(name, tuple(map(int, numbers))))
    return Chain(steps, facts, result)


def reckoning(question_type, chain):
    """For each step of a chain whether it follows from the words right before it.

    >>> text = "lamp 33 45 bed 21 27: right 24 back 18: 30 apart: 5.5"  # twice wrong
    >>> reckoning("absolute distance", read_chain(FORMS["absolute distance"], text))
    [False, True, False]
    """
    if question_type in OF_FACTS:
        return [(chain.steps, chain.result) == OF_FACTS[question_type](*chain.facts)]

    # 1. Each way, and the number that is said of it.
    turned = re.search(f"turn ({NUMBER})", chain.steps)
    measure = reckon.hour if turned else reckon.units_apart
    things, seen_from = chain.facts[::2], chain.facts[1::2]
    follows = []
    said = []
    for a, b, words in zip(things, seen_from, re.findall(READ_WAY, chain.steps)):
        side, right, order, back, number = words
        said_way = Fact(a.name, (SIGNS[side] * int(right), SIGNS[order] * int(back)))
        follows.append(said_way.numbers == reckon.way(a, b))
        if number:
            follows.append(int(number) == measure(said_way, HERE))
            said.append(int(number))

    # 2. The result. The functions take places: those that lie as far from here as is said.
    away = [Fact(thing.name, (number, 0)) for thing, number in zip(things, said)]
    if turned:
        face, target = said
        hours = int(turned[1])
        follows.append(hours == ((target - face) % 12 or 12))
        angle = math.radians(30 * hours)
        there = Fact("there", (math.sin(angle), math.cos(angle)))
        _, result = reckon.turn(HERE, Fact("ahead", (0, 1)), there)
    elif question_type == "absolute distance":
        _, result = reckon.apart(*away, HERE)
    elif question_type == "relative distance":
        _, result = reckon.nearest(HERE, *away)
    else:  # seen from the camera: one way
        _, result = reckon.compare(said_way, HERE)
    return [*follows, chain.result == result]


def sight(share, fact, truths):
    """Whether a fact about a thing of the true chain is true, or each number of it.

    Of several things of one name any may be meant.

    >>> sight("places", Fact("bed", (21, 28)), [Fact("bed", (21, 27)), Fact("lamp", (33, 45))])
    [True]
    >>> sight("lengths", Fact("room", (18, 27)), [Fact("room", (18, 20))])
    [True, False]
    """
    same = [truth.numbers for truth in truths if truth.name == fact.name]
    if not same:
        return []
    if share == "places":
        return [any(math.dist(fact.numbers, place) <= NEAR for place in same)]
    if share == "pictures":
        return [fact.numbers in same]
    return [abs(said - true) <= true / 10 for said, true in zip(fact.numbers, same[0])]


def judge(completion, reference):
    """{share: whether each thing that counts is right} of a well-formed completion.

    Args: reference: the row of the cold start with the true chain.
    """
    form = FORMS[reference["question_type"]]
    thought, answer = WELL_FORMED.fullmatch(completion).groups()
    chain = read_chain(form, thought)
    if chain is None:
        return {"in form": [False], "asked": [False], "whole": [False]}
    follows = reckoning(reference["question_type"], chain)
    truths = true_chain(reference).facts
    seen = []
    for fact in chain.facts:
        seen += sight(form.counts_for, fact, truths)
    return {
        "in form": [True],
        "asked": [[fact.name for fact in chain.facts] == [fact.name for fact in truths]],
        "whole": [all(follows)],
        "steps": follows,
        "answer": [chain.result == chosen_text(answer.strip(), reference["options"] or ())],
        form.counts_for: seen,
    }


def true_chain(reference):
    """The Chain of a row of the cold start; None where it is not about procedural rooms."""
    form = FORMS.get(reference.get("question_type"))
    solution = WELL_FORMED.fullmatch(reference.get("solution", ""))
    if form and solution:
        return read_chain(form, solution[1])


# ---------------------------------------------------------------------------------- a ladder


def chains_file(run):
    """Where the true chains of a ladder's test questions lie, if there are any."""
    test = None
    if (run / CONFIG).is_file():
        test = read_json(run / CONFIG).get("test")
    return Path(test or run / "rooms/test") / COLDSTART


def judge_rung(path, references):
    """{question type or "all": what `judge` returns of each chain} of a predictions.jsonl."""
    judged = {group: [] for group in (*FORMS, "all")}
    for where, row in read_jsonl(path):
        reference = references.get((row["id"], row["question_type"]))
        if reference is None or not is_well_formed(row["completion"].strip()):
            continue
        if row["answer"] != reference["answer"]:
            raise UserError(
                f"{where}: the true answer is {row['answer']}, expected {reference['answer']} as "
                f"in {COLDSTART} of the test rooms; evaluate again"
            )
        shares = judge(row["completion"].strip(), reference)
        judged[row["question_type"]].append(shares)
        judged["all"].append(shares)
    return judged


def judge_ladder(run):
    """{rung: what judge_rung returns} of the rungs that think; empty without true chains."""
    path = chains_file(run)
    if not path.is_file():
        return {}
    references = {}
    for _, row in read_jsonl(path):
        if true_chain(row):
            references[str(row["question_id"]), row["question_type"]] = row
    if not references:
        return {}
    rungs = {}
    for rung in RUNGS:
        path = run / "eval" / rung.name / "predictions.jsonl"
        if rung.style == "thinking" and path.is_file():
            rungs[rung.name] = judge_rung(path, references)
    return rungs


def mean(judged, share):
    """A share over some chains as text; nothing where nothing counts.

    >>> mean([{"steps": [True, False]}, {"steps": [True, True], "asked": [True]}], "steps")
    '0.750'
    """
    flags = []
    for shares in judged:
        flags += shares.get(share, [])
    return f"{sum(flags) / len(flags):.3f}" if flags else ""


def table(title, groups, shares):
    """A line for each group of chains, a column for each share.

    >>> print(table("", {"cold": [{"asked": [True]}, {"asked": [False]}]}, ("asked",)))
          chains  asked
    cold       2  0.500
    """
    lines = [[title, "chains", *shares]]
    for name, judged in groups.items():
        lines.append([name, len(judged), *[mean(judged, share) for share in shares]])
    return text_table(lines)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="directory that ladder.py wrote, such as runs/tiny")
    run = parser.parse_args().run
    rungs = judge_ladder(run)
    if not rungs:
        raise UserError(
            f"{run}: no chains to read; expected true ones in {chains_file(run)}, and the answers "
            "of a rung that thinks in eval/"
        )
    print(*[table(name, groups, SHARES) for name, groups in rungs.items()], sep="\n\n")


if __name__ == "__main__":
    main_guard(main)
