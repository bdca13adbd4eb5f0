"""The steps of a chain of thought: each follows from the words before it.

A fact is a name and its numbers:

    lamp 33 45          a place on the map of the floor
    bed 100 160 80      width, depth and height in centimeters, rounded to tens
    sofa 3              the first picture that shows it
    room 18 21          the lengths of the walls in quarter meters

The map is drawn in quarter meters, to the right and ahead of the first camera, which stands at
30 30. So the lamp above stands 0.75 m to the right of the camera and 3.75 m ahead of it.

A question's function takes facts. It returns the steps and the result, both as text. The result is
"" where the facts are all there is to say, and None where they leave it open. The base learns these
sentences from text alone, then about pictures (talk.py). The ladder's chains of thought are made of
them (scenes.py), and look/chains.py checks them.
"""

import math
from collections import namedtuple

UNIT = 0.25  # meters: the map's unit
CAMERA = 30  # both numbers of the first camera's place
SIDES = ("left-front", "left-back", "right-front", "right-back")
TURNS = ("left", "right", "back")

Fact = namedtuple("Fact", "name numbers")


# ---------------------------------------------------------------------------------- small steps


def on_map(right, ahead):
    """The numbers of a place, from meters to the right and ahead of the first camera.

    >>> on_map(0.75, 3.75), on_map(0, 0)
    ((33, 45), (30, 30))
    """
    return CAMERA + round(right / UNIT), CAMERA + round(ahead / UNIT)


def tell(fact):
    """
    >>> tell(Fact("lamp", (33, 45)))
    'lamp 33 45'
    """
    return " ".join([fact.name, *map(str, fact.numbers)])


def tell_all(facts):
    """
    >>> tell_all([Fact("lamp", (33, 45)), Fact("bed", (21, 27))])
    'lamp 33 45. bed 21 27'
    """
    return ". ".join(tell(fact) for fact in facts)


def way(a, b):
    """From b to a: to the right and to the back, in quarter meters.

    >>> way(Fact("lamp", (33, 45)), Fact("bed", (21, 47)))
    (12, -2)
    """
    return a.numbers[0] - b.numbers[0], a.numbers[1] - b.numbers[1]


def tell_way(a, b):
    """Both places side by side, and the way from the second to the first.

    >>> tell_way(Fact("lamp", (33, 45)), Fact("bed", (21, 47)))
    'lamp 33 45 bed 21 47: right 12 front 2'
    """
    right, back = way(a, b)
    side, depth = in_words(right, back)
    return f"{tell(a)} {tell(b)}: {side} {abs(right)} {depth} {abs(back)}"


def in_words(right, back):
    """Left or right, front or back; 0 counts as right and as back.

    >>> in_words(-3, 0)
    ('left', 'back')
    """
    return "left" if right < 0 else "right", "front" if back < 0 else "back"


def units_apart(a, b):
    """Quarter meters from one place to the other.

    >>> units_apart(Fact("lamp", (33, 45)), Fact("bed", (30, 41)))
    5
    """
    return round(math.dist(a.numbers, b.numbers))


def hour(a, b):
    """Where a is seen from b, as on a clock whose 12 is at the back; 12 also at the same place.

    >>> at = Fact("bed", (30, 30))
    >>> [hour(Fact("lamp", place), at) for place in ((30, 40), (40, 30), (30, 20), (29, 40))]
    [12, 3, 6, 12]
    """
    right, back = way(a, b)
    return round(math.degrees(math.atan2(right, back)) / 30) % 12 or 12


# ---------------------------------------------------------------------------------- questions


def say(*things):
    """Nothing but the facts.

    >>> say(Fact("lamp", (33, 45)), Fact("bed", (21, 27)))
    ('lamp 33 45. bed 21 27', '')
    """
    return tell_all(things), ""


def compare(a, b):
    """Where a is, seen from b: front is nearer to the camera.

    >>> compare(Fact("lamp", (33, 45)), Fact("bed", (21, 27)))
    ('lamp 33 45 bed 21 27: right 12 back 18', 'right-back')
    """
    right, back = way(a, b)
    if right == 0 or back == 0:
        return tell_way(a, b), None
    return tell_way(a, b), "-".join(in_words(right, back))


def apart(a, b):
    """Meters from one to the other.

    >>> apart(Fact("lamp", (33, 45)), Fact("bed", (21, 27)))
    ('lamp 33 45 bed 21 27: right 12 back 18: 22 apart', '5.5')
    """
    units = units_apart(a, b)
    return f"{tell_way(a, b)}: {units} apart", f"{units * UNIT:.1f}"


def nearest(target, *others):
    """Which of the others is nearest to the target.

    >>> lamp, bed, sofa = Fact("lamp", (33, 45)), Fact("bed", (30, 41)), Fact("sofa", (33, 44))
    >>> steps, name = nearest(lamp, bed, sofa)
    >>> print(name, *steps.split(". "), sep="\\n")
    sofa
    bed 30 41 lamp 33 45: left 3 front 4: 5 apart
    sofa 33 44 lamp 33 45: right 0 front 1: 1 apart
    """
    steps = []
    units = []
    for other in others:
        units.append(units_apart(other, target))
        steps.append(f"{tell_way(other, target)}: {units[-1]} apart")
    least = units.index(min(units))
    name = others[least].name if units.count(min(units)) == 1 else None
    return ". ".join(steps), name


def turn(stand, face, target):
    """Where the target is for somebody who stands at one thing and faces another.

    A turn of 1 to 4 hours is to the right, of 5 to 7 to the back, of 8 to 11 to the left. At 12
    hours the target is straight ahead, and the result is None.

    >>> stand, face, target = Fact("bed", (30, 30)), Fact("lamp", (40, 30)), Fact("bin", (30, 40))
    >>> steps, word = turn(stand, face, target)
    >>> print(word, *steps.split(". "), sep="\\n")
    left
    lamp 40 30 bed 30 30: right 10 back 0: at 3
    bin 30 40 bed 30 30: right 0 back 10: at 12: turn 9
    >>> turn(stand, face, face)[1] is None
    True
    """
    steps = []
    for seen in (face, target):
        steps.append(f"{tell_way(seen, stand)}: at {hour(seen, stand)}")
    hours = (hour(target, stand) - hour(face, stand)) % 12 or 12
    if hours <= 4:
        word = "right"
    elif hours <= 7:
        word = "back"
    elif hours <= 11:
        word = "left"
    else:
        word = None
    return f"{'. '.join(steps)}: turn {hours}", word


def longest(thing):
    """The longest side in centimeters.

    >>> longest(Fact("bed", (100, 160, 80)))
    ('bed 100 160 80', '160')
    """
    return tell(thing), str(max(thing.numbers))


def floor(room):
    """Whole square meters, from the walls in quarter meters.

    >>> floor(Fact("room", (18, 21)))
    ('room 18 21', '24')
    """
    width, depth = room.numbers
    return tell(room), str(round(width * depth * UNIT**2))


def total(*things):
    """How many there are: each has its number, as all have the same name.

    >>> total(Fact("chair", (33, 45)), Fact("chair", (21, 27)))
    ('1 chair 33 45. 2 chair 21 27', '2')
    """
    steps = [f"{number} {tell(thing)}" for number, thing in enumerate(things, 1)]
    return ". ".join(steps), str(len(things))


def order(*things):
    """Names by the first picture that shows them.

    >>> order(Fact("bed", (3,)), Fact("lamp", (1,)), Fact("sofa", (5,)))
    ('bed 3. lamp 1. sofa 5', 'lamp, bed, sofa')
    """
    if len({thing.numbers for thing in things}) < len(things):
        return tell_all(things), None
    in_order = sorted(things, key=lambda thing: thing.numbers)
    return tell_all(things), ", ".join(thing.name for thing in in_order)


def chain(steps, result):
    """The steps, then the result if there is one.

    >>> chain("bed 100 160 80", "160"), chain("lamp 33 45", "")
    ('bed 100 160 80: 160', 'lamp 33 45')
    """
    return f"{steps}: {result}" if result else steps
