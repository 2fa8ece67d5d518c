"""The words the generated documents are made of, and invented ones, so that models learn to copy what they never saw.

An invented word belongs to training or to evaluation by its checksum, so no name of an evaluation was ever trained on.
"""

# ruff: noqa: E501, SIM905, RUF005  (a hundred words in quotes of their own read worse)

import random
import zlib

FIRST_NAMES = (
    "John Mary Ada Alan Grace Linus Emma Noah Olivia Liam Sofia Lucas Mia Hugo Alice Bob Carol David Erin Frank Gina "
    "Henry Iris Jack Karen Leo Maya Nina Oscar Paula Quentin Rosa Sam Tina Umar Vera Walter Xenia Yusuf Zoe Priya "
    "Chen Fatima Ivan Ingrid Jorge Kenji Lars Amina Tomas Beatrice Cyrus Dora Elias Fiona George Hannah Isaac Julia"
).split()
LAST_NAMES = (
    "Smith Doe Lovelace Turing Hopper Johnson Brown Garcia Miller Davis Lopez Wilson Moore Taylor Jackson Martin Lee "
    "Walker Young King Wright Scott Green Baker Adams Nelson Carter Mitchell Perez Roberts Turner Phillips Evans Cooper "
    "Reed Bailey Bell Murphy Okafor Tanaka Nguyen Kowalski Haddad Novak Silva Rossi Schmidt Larsen Dubois Petrov Sharma"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Tokyo Oslo Lima Cairo Delhi Boston Chicago Denver Seattle Austin Dallas Portland "
    "Toronto Sydney Dublin Lisbon Vienna Prague Athens Helsinki Geneva Kyoto Nairobi Lagos Quito Havana Springfield "
    "Oakland Fresno Houston Phoenix Atlanta Miami"
).split() + ["San Francisco", "San Fransisco", "New York", "Los Angeles", "St. Louis", "Buenos Aires", "Hong Kong"]
STATES = "CA NY TX WA OR MA FL IL CO NV AZ GA OH PA NC VA MI MN NJ UT".split()
STREETS = (
    "Main Oak Pine Maple Cedar Elm Washington Lake Hill Park River Church Market Mission Valencia Broadway Sunset "
    "Lincoln Franklin Jefferson Madison Spring Ridge Highland Meadow Forest Garden Mill Station Harbor"
).split()
STREET_KINDS = "St. Street Ave Avenue Rd. Road Lane Blvd Drive Way Court Place".split()
NOUNS = (
    "apple bread chair table lamp book garden river mountain window door bottle guitar piano camera laptop phone bicycle "
    "hammer ladder basket candle carpet mirror pencil paper box cup plate spoon knife fork shirt jacket shoe hat scarf "
    "ring watch wallet bag umbrella key lock clock engine wheel rocket boat train plane bridge tower castle island forest "
    "desert ocean beach storm cloud rain snow wind fire stone sand gold silver copper iron glass wood cotton wool silk"
).split()
ADJECTIVES = (
    "red blue green yellow black white small large old new fast slow bright dark warm cold quiet loud heavy light soft "
    "hard sweet bitter fresh dry clean simple happy brave gentle clever strange early late open closed wide narrow deep"
).split()
HOBBIES = (
    "reading chess swimming cooking painting hiking running cycling fishing dancing singing gardening climbing skiing "
    "surfing knitting writing photography pottery sailing archery baking juggling drawing yoga"
).split()
FOODS = (
    "pizza pasta sushi soup salad bread rice noodles curry tacos pancakes waffles cheese chocolate apples bananas "
    "cherries mangoes oranges grapes dumplings risotto lasagna falafel hummus"
).split()
ANIMALS = (
    "dog cat horse rabbit parrot turtle hamster elephant tiger lion dolphin penguin owl fox wolf bear otter koala panda "
    "giraffe zebra eagle whale seal hedgehog"
).split()
COLOURS = "red blue green yellow orange purple black white pink brown grey turquoise violet silver gold".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl qu sh st th tr".split() + [""]
_VOWELS = "a e i o u ai ea oo y ia".split()
_CODAS = "n r s l m k t x nd rt ck th".split() + [""] * 5


def invented(rng: random.Random, held_out: bool) -> str:
    """A pronounceable word that no list has, lower-case; one of ten exists only where held_out."""
    while True:
        n_syllables = rng.choice((2, 2, 2, 3, 3, 1))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(n_syllables))
        if (
            len(word) > 2
            and word not in ("yes", "no", "on", "off", "true", "false", "null", "nan", "inf")
            and ((zlib.crc32(word.encode()) % 10 == 0) == held_out)
        ):
            return word


def scrambled(rng: random.Random) -> str:
    """Letters without any pattern, such as `xKqvtz`: nothing but copying gets them right."""
    letters = (
        "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.7 else "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )
    return "x" + "".join(rng.choice(letters) for _ in range(rng.randint(3, 9)))


def first_name(rng: random.Random, held_out: bool) -> str:
    """A listed name, or an invented one; only invented ones where held_out, since every listed name is trained on."""
    if not held_out and rng.random() < 0.5:
        return rng.choice(FIRST_NAMES)
    return invented(rng, held_out).capitalize()


def last_name(rng: random.Random, held_out: bool) -> str:
    if not held_out and rng.random() < 0.5:
        return rng.choice(LAST_NAMES)
    return invented(rng, held_out).capitalize()
