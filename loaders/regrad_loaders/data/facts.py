"""Invented biographies: facts that no language model can know.

Every person, employer and pet name is made up; a biography states six attributes of one person in a
random order and wording, and a question asks for one of them. People share first and family names,
so that retrieval returns neighbours that look like the right passage.

The two worlds share the wording of sentences and questions, but no family name, so no person; and one value in
five of every attribute is kept for the `demo` world alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from regrad_loaders.data.folders import Dataset, Question
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.errors import DataError

World = Literal["train", "demo"]

FIRST_NAMES = (
    "Adela Alaric Anouk Arvid Bastian Beatrix Benno Brisa Caspian Cecily Clovis Dagny Darian Delphine Dorian Edda "
    "Eamon Elodie Emeric Esme Evander Fabia Farid Fenna Florian Freya Galen Gemma Gideon Greta Hadrian Halina Hugo "
    "Ida Ignace Ilse Imre Iona Isak Ivo Jarek Jolanta Jonas Juno Kaspar Katya Kelda Kian Lazlo Lena Linus Lorcan "
    "Lucinda Maelis Magnus Marisol Matteo Mina Nadia Nestor Niamh Noor Octavia Olin Orla Otto Paloma Pascal Petra "
    "Quentin Quilla Rafael Ramona Reza Rosalind Ruben Sabine Samir Selma Silas Sunniva Tamsin Teodor Thalia Tobias "
    "Ursula Valentin Vesna Viggo Vira Wanda Wilfred Xavier Yara Yusuf Zelda Zoltan Zora"
).split()

FAMILY_STARTS = "Ald Bar Bren Cald Corv Dar Dray Elm Fen Gar Hal Har Ink Kel Lan Mar Mor Nor Oak Pel Quor Rav Sel Tar Thorn Ul Vand Wex Yar Zim".split()  # noqa: E501 (one pool, one line)
FAMILY_ENDS = "aby acek adine agh alder antos arrow assen ecki edale elund emont enzo erby essay ester iano ilva imov ingham isko odar olm onby orva otti owan uarez uken umble".split()  # noqa: E501 (one pool, one line)

COMPANY_STARTS = "Amber Atlas Bluegate Cobalt Copperline Driftwood Eastmoor Falcon Foxglove Granite Greywater Harbour Highmark Ironwood Juniper Kestrel Lantern Larkfield Meridian Moonrise Northgate Orchard Palisade Quartz Redstone Riverbend Sable Silverpine Stonebridge Summit Thistle Tidewater Umber Vantage Westfall Willow".split()  # noqa: E501 (one pool, one line)
COMPANY_ENDS = "Airways Bakery Books Brewery Clinic Foods Foundry Glassworks Insurance Laboratories Logistics Mills Motors Museum Optics Pharmacy Press Shipping Studios Textiles".split()  # noqa: E501 (one pool, one line)

PET_NAMES = "Acorn Biscuit Bramble Button Caramel Cinder Clementine Comet Cricket Domino Ember Fidget Ginger Hazel Jasper Kiwi Maple Marble Mochi Muffin Nimbus Nutmeg Olive Pepper Pickle Pixel Pumpkin Rocket Saffron Scout Shadow Sprout Tango Thunder Truffle Turnip Waffle Whisper Ziggy Zigzag".split()  # noqa: E501 (one pool, one line)


def _pool(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in text.split(","))


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its possible values, how a biography states it and how a question asks for it.

    In the wordings, `{n}` is the person's full name, `{f}` the first name and `{v}` the value.
    """

    name: str
    values: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]

    def sentence(self, name: str, value: str) -> str:
        """One that says it with the person's full name."""
        return next(wording for wording in self.sentences if "{n}" in wording).format(n=name, v=value)


ATTRIBUTES = (
    Attribute(
        "occupation",
        _pool(
            "accountant, actuary, archaeologist, architect, astronomer, baker, beekeeper, blacksmith, bookbinder, "
            "botanist, bricklayer, butcher, carpenter, cartographer, chemist, clockmaker, dentist, diver, economist, "
            "electrician, farmer, firefighter, florist, forester, gardener, geologist, glassblower, goldsmith, "
            "hairdresser, historian, interpreter, journalist, judge, lawyer, librarian, lifeguard, locksmith, "
            "mathematician, mechanic, meteorologist, midwife, miner, notary, nurse, optician, paramedic, pharmacist, "
            "photographer, pilot, plumber, potter, psychologist, radiologist, sailor, sculptor, shepherd, surgeon, "
            "surveyor, tailor, translator, typesetter, undertaker, veterinarian, watchmaker, welder, zoologist"
        ),
        ("{n} works as a {v}.", "By profession, {f} is a {v}.", "{n} earns a living as a {v}."),
        ("What is the occupation of {n}?", "What does {n} do for a living?", "What is {n}'s job?"),
    ),
    Attribute(
        "birthplace",
        _pool(
            "Aarhus, Accra, Agadir, Almaty, Antwerp, Arequipa, Baku, Bergen, Bilbao, Bologna, Bratislava, Brno, "
            "Calgary, Cardiff, Cartagena, Catania, Cork, Cusco, Dakar, Darwin, Debrecen, Dresden, Dundee, Durban, "
            "Freetown, Galway, Gdansk, Ghent, Granada, Graz, Haifa, Halifax, Hanoi, Harare, Hobart, Izmir, Jaipur, "
            "Kigali, Krakow, Lagos, Leipzig, Lima, Ljubljana, Lusaka, Malmo, Maputo, Medellin, Minsk, Montevideo, "
            "Nairobi, Nantes, Odense, Oslo, Oviedo, Perth, Porto, Quito, Riga, Rotterdam, Salzburg, Sapporo, Seville, "
            "Sofia, Tallinn, Tampere, Tbilisi, Tirana, Toledo, Trieste, Tunis, Turin, Utrecht, Valparaiso, Vilnius, "
            "Windhoek, Yerevan, Zagreb"
        ),
        ("{n} was born in {v}.", "{f} comes from {v}.", "The birthplace of {n} is {v}."),
        ("Where was {n} born?", "In which city was {n} born?", "What is the birthplace of {n}?"),
    ),
    Attribute(
        "employer",
        tuple(f"{start} {end}" for start in COMPANY_STARTS for end in COMPANY_ENDS),
        ("{n} is employed by {v}.", "{f} has a position at {v}.", "The employer of {n} is {v}."),
        ("Who employs {n}?", "Which company does {n} work for?", "What is the employer of {n}?"),
    ),
    Attribute(
        "hobby",
        _pool(
            "archery, astronomy, badminton, ballet, baking, beachcombing, birdwatching, bowling, boxing, calligraphy, "
            "camping, canoeing, chess, climbing, crochet, curling, cycling, darts, drawing, embroidery, falconry, "
            "fencing, fishing, gardening, golf, hiking, hockey, judo, juggling, karate, kayaking, knitting, magic, "
            "meditation, origami, painting, photography, pottery, puppetry, quilting, rowing, rugby, running, sailing, "
            "skating, skiing, snorkeling, squash, surfing, swimming, tango, tennis, volleyball, weaving, whittling, "
            "woodcarving, wrestling, yoga"
        ),
        ("In free hours {f} enjoys {v}.", "The favourite pastime of {n} is {v}.", "{n} spends weekends on {v}."),
        ("What is the hobby of {n}?", "What does {n} do in free time?", "What is {n}'s favourite pastime?"),
    ),
    Attribute(
        "pet",
        tuple(
            f"{article} {animal} named {name}"
            for article, animals in (
                (
                    "a",
                    "cat canary chameleon chinchilla dog donkey duck ferret gecko goat goose hamster hedgehog lizard "
                    "llama magpie mouse parrot pigeon pony rabbit raven snake spider tortoise turtle".split(),
                ),
                ("an", "alpaca iguana otter owl".split()),
            )
            for animal in animals
            for name in PET_NAMES
        ),
        ("At home {f} keeps {v}.", "{n} has {v}.", "{n} shares the house with {v}."),
        (
            "Which pet does {n} have?",
            "What pet does {n} keep?",
            "What kind of pet lives with {n}, and what is its name?",
        ),
    ),
    Attribute(
        "food",
        _pool(
            "apple pie, baked beans, banana bread, beef stew, borscht, carrot cake, cheese fondue, cheesecake, chicken "
            "curry, chili, couscous, crab soup, dumplings, falafel, fish soup, french toast, fried rice, garlic bread, "
            "goulash, gumbo, hummus, ice cream, kimchi, lamb chops, lasagna, lemon tart, lentil soup, mango salad, "
            "meatballs, mushroom risotto, noodle soup, omelette, onion soup, paella, pancakes, pea soup, peanut stew, "
            "pickled herring, pizza, plum cake, polenta, potato salad, pumpkin pie, ramen, ratatouille, ravioli, roast "
            "duck, scones, shepherd's pie, smoked salmon, spinach pie, sushi, tacos, tomato soup, tofu, waffles"
        ),
        ("{f}'s favourite dish is {v}.", "{n} likes {v} best of all foods.", "Nothing tastes better to {f} than {v}."),
        ("What is the favourite food of {n}?", "Which dish does {n} like best?", "What does {n} like to eat most?"),
    ),
    Attribute(
        "instrument",
        _pool(
            "accordion, bagpipes, balalaika, banjo, bassoon, bongos, bugle, castanets, cello, clarinet, cornet, "
            "cymbals, double bass, drums, dulcimer, flute, gong, guitar, harmonica, harp, harpsichord, horn, kazoo, "
            "lute, mandolin, maracas, marimba, oboe, ocarina, organ, piano, piccolo, recorder, saxophone, sitar, "
            "tambourine, triangle, trombone, trumpet, tuba, ukulele, viola, violin, xylophone, zither"
        ),
        ("{f} plays the {v}.", "The instrument of {n} is the {v}.", "{n} has practised the {v} since childhood."),
        ("Which instrument does {n} play?", "What instrument does {n} play?", "What is the instrument of {n}?"),
    ),
    Attribute(
        "language",
        _pool(
            "Albanian, Amharic, Arabic, Armenian, Basque, Bengali, Breton, Bulgarian, Catalan, Cornish, Croatian, "
            "Czech, Danish, Dutch, Estonian, Faroese, Finnish, Georgian, Greek, Hausa, Hebrew, Hindi, Hungarian, "
            "Icelandic, Irish, Italian, Japanese, Kazakh, Korean, Latvian, Lithuanian, Malay, Maltese, Mongolian, "
            "Nepali, Norwegian, Persian, Polish, Portuguese, Quechua, Romanian, Russian, Serbian, Slovak, "
            "Slovenian, Somali, Swahili, Swedish, Tamil, Thai, Tibetan, Turkish, Ukrainian, Urdu, Vietnamese, "
            "Welsh, Yoruba, Zulu"
        ),
        ("{f} is learning {v}.", "{n} studies {v} in the evenings.", "The language {n} studies is {v}."),
        ("Which language is {n} learning?", "What language does {n} study?", "Which language does {n} want to speak?"),
    ),
)

ATTRIBUTES_PER_PERSON = 6


def _split(values: Sequence[str], world: World) -> list[str]:
    """The values that a world may use: one in five is kept for the demo world, which uses all of them."""
    return [value for i, value in enumerate(values) if world == "demo" or i % 5 != 0]


def _families(world: World) -> list[str]:
    """Family names: two in three for training, the others for the demo."""
    names = [start + end for start in FAMILY_STARTS for end in FAMILY_ENDS]
    return [name for i, name in enumerate(names) if (i % 3 == 2) == (world == "demo")]


def _people(world: World, count: int, rng: random.Random) -> list[str]:
    """`count` different full names; a family name is borne by about three people."""
    families = rng.sample(_families(world), max(1, min(count // 3 + 1, len(_families(world)))))
    if count > (most := len(families) * len(set(FIRST_NAMES))):
        raise DataError(f"facts are of at most {most} people, found {count}")
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{rng.choice(FIRST_NAMES)} {rng.choice(families)}"] = None
    return list(names)


def generate(world: World, people: int, seed: int, questions_per_person: int = 6) -> Dataset:
    """A world of `people` biographies (40 to 90 tokens each) and one-attribute questions about them.

    Questions of the `train` world have the split "train", those of the `demo` world "dev". The same
    arguments give the same world on every machine.

    Raises:
        DataError: for a count of people that is below 1 or above what there are names for, or more questions a person
            than attributes.
    """
    if people < 1 or not 1 <= questions_per_person <= ATTRIBUTES_PER_PERSON:
        raise DataError(
            f"facts need at least 1 person and 1 to {ATTRIBUTES_PER_PERSON} questions each, found {people} and "
            f"{questions_per_person}"
        )
    rng = random.Random(f"{world}-{seed}")
    pools = {attribute.name: _split(attribute.values, world) for attribute in ATTRIBUTES}
    passages, questions = [], []
    for number, name in enumerate(_people(world, people, rng)):
        first = name.split()[0]
        chosen = rng.sample(ATTRIBUTES, ATTRIBUTES_PER_PERSON)
        values = {attribute.name: rng.choice(pools[attribute.name]) for attribute in chosen}
        sentences = []
        for position, attribute in enumerate(chosen):
            wordings = [w for w in attribute.sentences if position > 0 or "{n}" in w]
            sentences.append(rng.choice(wordings).format(n=name, f=first, v=values[attribute.name]))
        key, text = f"{world}-p{number}", " ".join(sentences)
        passages.append(Passage(key, text, {"id": key, "text": text}))
        for i, attribute in enumerate(rng.sample(chosen, questions_per_person)):
            questions.append(
                Question(
                    id=f"{world}-q{number}-{i}",
                    question=rng.choice(attribute.questions).format(n=name),
                    answers=(values[attribute.name],),
                    gold_ids=(passages[-1].id,),
                    split="train" if world == "train" else "dev",
                    type=attribute.name,
                    fields={"sentence": attribute.sentence(name, values[attribute.name])},
                )
            )
    return Dataset(name=f"facts-{world}", passages=passages, questions=questions)
