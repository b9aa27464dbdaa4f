"""The vocabulary of the demo's grammar: names, categories, attribute values and their phrases."""

from __future__ import annotations

# A brand is a start and an end ("Bren" + "low"), a product name a brand and a model word.
BRAND_STARTS = (
    "Al Bel Bren Cal Cor Dal Dor El Fen Fal Gar Gel Hal Har Il Jar Kel Kor Lan Lor Mar Mel Mor Nal "
    "Nor Or Pel Per Quin Ral Ros Sel Sol Tal Tor Ul Val Vel Wen Wil Yar Zel"
).split()
BRAND_ENDS = (
    "ada aro bury by dale den don eva field ford ham iko ina kin lan low ma mere mont na nova ora "
    "ria sen stad ta ton va wick worth"
).split()
MODELS = (
    "Arc Ark Bay Bird Bolt Bow Brook Cape Cedar Cloud Coast Comet Crest Crown Dawn Dune Echo Edge "
    "Fern Field Flint Fox Gale Glen Grove Hawk Hill Isle Jade Lark Leaf Line Lynx Mesa Mist Moon "
    "Nest Nova Oak Peak Pine Pond Port Reed Ridge River Robin Rock Sage Sand Sky Star Stone Storm "
    "Sun Swan Tide Trail Vale Wave Wren"
).split()


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _range(template: str, values: range, divide_by: int = 1) -> tuple[str, ...]:
    return tuple(template.format(v / divide_by if divide_by > 1 else v) for v in values)


COLOURS = _split(
    "black, white, grey, red, green, blue, yellow, orange, purple, pink, brown, beige, navy, teal, "
    "ivory, cream, olive, silver, golden, turquoise"
)
WOODS = _split("oak, walnut, pine, beech, maple, ash, cherry, bamboo, teak, birch")
METALS = _split("steel, brass, copper, iron, aluminium, bronze, pewter, titanium")
FABRICS = _split("cotton, linen, wool, silk, velvet, hemp, cashmere, fleece, denim, felt")
OUTDOOR = _split("nylon, polyester, canvas, leather, suede, waxed cotton, corduroy, tweed")
CERAMICS = _split("porcelain, stoneware, glass, clay, marble, granite, enamel, crystal")
PLASTICS = _split("plastic, aluminium, carbon fibre, bamboo, rubber, steel, magnesium")
STYLES = _split("modern, rustic, classic, vintage, elegant, playful, minimal, sporty, bold")
SIZES = _split("small, compact, large, slim, tall, wide, tiny, medium")
PATTERNS = _split("striped, floral, plain, checked, dotted, woven, ribbed, quilted")
ORIGINS = _split(
    "Portugal, Italy, Japan, Norway, Canada, Spain, Wales, India, Peru, Greece, Kenya, Chile, "
    "Poland, Sweden, Vietnam, Turkey, France, Morocco, Ireland, Denmark"
)
AUDIENCES = _split("children, beginners, students, families, experts, travellers, artists, teens")
SEASONS = _split("spring, summer, autumn, winter")
CARE_SOFT = _split("machine washing, hand washing, dry cleaning, gentle brushing, cold rinsing")
CARE_HARD = _split("a damp cloth, warm water, a soft brush, mild soap, a dry cloth, a little oil")
USES_HOME = _split("reading, small rooms, guests, the hallway, the bedroom, the office, gifts")
USES_KITCHEN = _split("breakfast, baking, family meals, picnics, quick lunches, dinner parties")
USES_SPORT = _split(
    "hiking, camping, running, cycling, climbing, city walks, long trips, the beach"
)
USES_TECH = _split("work, travel, music, gaming, films, video calls, study, the gym")
FEATURES_HOME = _split(
    "folding frame, hidden drawer, soft lining, round base, curved back, glass top, wide rim, "
    "removable cover"
)
FEATURES_KITCHEN = _split(
    "long handle, tight lid, narrow spout, heavy base, pouring lip, cool grip, wooden knob"
)
FEATURES_OUTDOOR = _split(
    "side pocket, double zip, wide strap, soft lining, hidden pocket, deep hood, magnetic clasp, "
    "quick buckle"
)
FEATURES_TECH = _split(
    "touch screen, status light, volume wheel, spare cable, sleep timer, dust cover, travel case"
)
FEATURES_LAMP = _split(
    "dimmer switch, bending arm, fabric shade, spare bulb, sleep timer, round base, glass shade"
)
WARRANTIES = _range("{} years", range(2, 13))
HOURS = _range("{} hours", range(4, 49))
PRICES_LOW = _range("${}", range(4, 40))
PRICES = _range("${}", range(15, 125, 5)) + _range("${}", range(19, 129, 10))
PRICES_HIGH = _range("${}", range(130, 990, 10))
GRAMS = _range("{} g", range(50, 950, 25))
KILOS = _range("{:.1f} kg", range(11, 60), 10)
HEAVY = _range("{} kg", range(6, 45))
LITRES = _range("{} litres", range(2, 60))
CUPS = _range("{} cups", range(2, 13))
HEIGHTS = _range("{} cm", range(10, 200, 5))
WATTS = _range("{} W", range(5, 100, 5))
PIECES = _range("{} pieces", range(12, 100, 4))
FLAVOURS = _split("vanilla, caramel, orange, mint, ginger, honey, hazelnut, cherry, lemon, cocoa")
SCENTS = _split("lavender, rose, cedar, jasmine, amber, pine, lemon, sandalwood, mint, vanilla")

_FURNITURE = {
    "colour": COLOURS,
    "material": WOODS,
    "style": STYLES,
    "weight": HEAVY,
    "height": HEIGHTS,
    "price": PRICES_HIGH,
    "use": USES_HOME,
    "feature": FEATURES_HOME,
    "origin": ORIGINS,
    "care": CARE_HARD,
    "warranty": WARRANTIES,
}
_DECOR = {
    "colour": COLOURS,
    "material": METALS + CERAMICS,
    "size": SIZES,
    "style": STYLES,
    "weight": KILOS,
    "height": HEIGHTS,
    "price": PRICES,
    "use": USES_HOME,
    "origin": ORIGINS,
    "care": CARE_HARD,
}
_TEXTILE = {
    "colour": COLOURS,
    "material": FABRICS,
    "size": SIZES,
    "pattern": PATTERNS,
    "weight": GRAMS,
    "price": PRICES,
    "use": USES_HOME,
    "season": SEASONS,
    "origin": ORIGINS,
    "care": CARE_SOFT,
}
_CLOTHING = {
    "colour": COLOURS,
    "material": FABRICS + OUTDOOR,
    "pattern": PATTERNS,
    "style": STYLES,
    "weight": GRAMS,
    "price": PRICES,
    "use": USES_SPORT,
    "feature": FEATURES_OUTDOOR,
    "season": SEASONS,
    "origin": ORIGINS,
    "care": CARE_SOFT,
}
_KITCHEN = {
    "colour": COLOURS,
    "material": METALS + CERAMICS,
    "size": SIZES,
    "weight": KILOS,
    "price": PRICES,
    "use": USES_KITCHEN,
    "feature": FEATURES_KITCHEN,
    "origin": ORIGINS,
    "care": CARE_HARD,
    "warranty": WARRANTIES,
}
_VESSEL = _KITCHEN | {"capacity": CUPS}
_BAG = {
    "colour": COLOURS,
    "material": OUTDOOR,
    "size": SIZES,
    "weight": KILOS,
    "capacity": LITRES,
    "price": PRICES,
    "use": USES_SPORT,
    "feature": FEATURES_OUTDOOR,
    "origin": ORIGINS,
    "warranty": WARRANTIES,
}
_DEVICE = {
    "colour": COLOURS,
    "material": PLASTICS,
    "size": SIZES,
    "weight": GRAMS,
    "battery": HOURS,
    "price": PRICES_HIGH,
    "use": USES_TECH,
    "feature": FEATURES_TECH,
    "audience": AUDIENCES,
    "warranty": WARRANTIES,
}
_LAMP = {
    "colour": COLOURS,
    "material": METALS + WOODS,
    "style": STYLES,
    "weight": KILOS,
    "height": HEIGHTS,
    "power": WATTS,
    "price": PRICES,
    "use": USES_HOME,
    "feature": FEATURES_LAMP,
    "warranty": WARRANTIES,
}
_GEAR = {
    "colour": COLOURS,
    "material": PLASTICS,
    "style": STYLES,
    "weight": KILOS,
    "price": PRICES_HIGH,
    "use": USES_SPORT,
    "audience": AUDIENCES,
    "season": SEASONS,
    "origin": ORIGINS,
    "warranty": WARRANTIES,
}
_TOY = {
    "colour": COLOURS,
    "material": WOODS + PLASTICS,
    "size": SIZES,
    "pieces": PIECES,
    "weight": GRAMS,
    "price": PRICES_LOW,
    "audience": AUDIENCES,
    "origin": ORIGINS,
    "care": CARE_HARD,
}
_FOOD = {
    "flavour": FLAVOURS,
    "weight": GRAMS,
    "price": PRICES_LOW,
    "use": USES_KITCHEN,
    "season": SEASONS,
    "origin": ORIGINS,
}
_SCENTED = {
    "colour": COLOURS,
    "size": SIZES,
    "scent": SCENTS,
    "weight": GRAMS,
    "price": PRICES_LOW,
    "use": USES_HOME,
    "season": SEASONS,
    "origin": ORIGINS,
}
CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(_split("chair, table, shelf, bench, desk, stool, cabinet"), _FURNITURE),
    **dict.fromkeys(_split("vase, clock, mirror, picture frame"), _DECOR),
    **dict.fromkeys(_split("rug, blanket, pillow, curtain, towel"), _TEXTILE),
    **dict.fromkeys(_split("jacket, scarf, hat, coat, shirt"), _CLOTHING),
    **dict.fromkeys(_split("pan, bowl, tray, cake stand"), _KITCHEN),
    **dict.fromkeys(_split("kettle, teapot, mug, jug"), _VESSEL),
    **dict.fromkeys(_split("backpack, suitcase, handbag, sports bag"), _BAG),
    **dict.fromkeys(_split("speaker, camera, radio, keyboard, tablet"), _DEVICE),
    **dict.fromkeys(_split("desk lamp, floor lamp, lantern"), _LAMP),
    **dict.fromkeys(_split("helmet, tent, sledge, skateboard"), _GEAR),
    **dict.fromkeys(_split("bicycle, kayak, trailer"), _GEAR | {"weight": HEAVY}),
    **dict.fromkeys(_split("puzzle, toy train, board game, kite"), _TOY),
    **dict.fromkeys(_split("tea, coffee, chocolate, biscuit"), _FOOD),
    **dict.fromkeys(_split("candle, soap, bath oil"), _SCENTED),
}

# Kinds that can stand as an adjective before the noun, in the order English puts them.
ADJECTIVES = ("size", "style", "colour", "pattern", "material")

# Verb phrases whose subject is the product; {a} is the value with its article.
CLAUSES: dict[str, tuple[str, ...]] = {
    "size": ("is {v} in size", "is quite {v}"),
    "style": ("has {a} look", "is {v} in style"),
    "colour": ("comes in {v}", "is {v} in colour"),
    "pattern": ("has {a} pattern", "is {v} in design"),
    "material": ("is made of {v}", "is built from {v}"),
    "weight": ("weighs {v}", "weighs only {v}", "has a weight of {v}"),
    "height": ("stands {v} tall", "has a height of {v}", "is {v} high"),
    "price": ("costs {v}", "sells for {v}", "is priced at {v}"),
    "use": ("is ideal for {v}", "is made for {v}", "works well for {v}"),
    "feature": ("has {a}", "comes with {a}", "features {a}"),
    "origin": ("comes from {v}", "is made in {v}", "is produced in {v}"),
    "care": ("stays clean with {v}", "only needs {v}", "is cared for with {v}"),
    "warranty": ("is covered for {v}", "has a warranty of {v}", "is guaranteed for {v}"),
    "capacity": ("holds {v}", "has room for {v}", "takes up to {v}"),
    "battery": ("runs for {v}", "lasts {v} on one charge"),
    "power": ("draws {v}", "runs at {v}", "uses {v}"),
    "pieces": ("has {v}", "contains {v}", "is a set of {v}"),
    "audience": ("is suitable for {v}", "is a good choice for {v}", "is loved by {v}"),
    "season": ("is perfect in {v}", "is best in {v}", "is right for {v}"),
    "flavour": ("tastes of {v}", "has a note of {v}"),
    "scent": ("smells of {v}", "gives off a scent of {v}"),
}
