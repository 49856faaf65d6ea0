"""The vocabulary of the tiny world. Short words, so that nearly every one is a single token."""


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# First names and surnames of people who are invented anew for every document.
FIRST_NAMES = listed("""Abel Ada Agnes Amos Anna Basil Bela Ben Bess Bram Cara Carl Cleo Cora Dan Dina Dora Edda Eli
    Ella Emil Emma Enid Erik Esme Eva Ezra Finn Flora Fred Gail Gus Hans Hazel Hugo Ida Igor Ines Ira Iris Ivan Jack
    Jane Joan Jonas Jude June Karl Kate Kira Lars Lea Leo Lily Lois Lola Luca Lucy Mara Mark Max Maya Mila Mina Moses
    Nell Nils Nina Nora Oskar Otto Owen Paul Petra Ralf Rita Rosa Ruth Saul Sven Tara Tess Theo Tina Tom Uma Vera Viola
    Walt Wanda Yara Zara Zeno Zoe""")
SURNAMES = listed("""Ashby Barr Bell Birch Bond Brook Burr Cole Crane Cross Dale Dell Drew Dunn Eddy Elm Finch Flint
    Ford Frost Gale Glen Gray Grove Hale Hart Heath Hill Holt Hull Kemp Kerr Lake Lamb Lang Lark Lowe Lund Marsh Moss
    Nash North Oak Park Peel Pike Pond Quill Rand Reed Ridge Rowe Shaw Snow Stone Swift Thorn Vale Voss Ward Webb West
    Wood York""")
# First names of the residents: people who are always the same and can be learned by heart.
RESIDENT_NAMES = listed("""Alba Boris Celia Doris Edgar Fiona Greta Horace Irma Jasper Klaus Laura Magda Niklas Olive
    Pablo Quentin Ramona Silas Trudy Ulrich Valda Wendel Xenia Yvonne Zelda Arno Bianca Cyrus Dagmar Elmer Frida Gideon
    Hilda Isidor Jolanda Kasimir Leonie Marcel Norma""")
TOWNS = listed("""Arden Belmont Calder Dunmore Elton Farley Gatton Hadley Ipsford Kelso Linden Marlow Norwick Oldham
    Penrith Quorn Ripon Selby Tarrant Upton Vernham Walcot Yarrow Zennor""")
JOBS = listed("""baker barber carter clerk cook doctor farmer fisher gardener guard hunter judge mason miller miner
    painter pilot porter potter sailor singer smith tailor teacher weaver writer""")
ANIMALS = listed("""badger bear camel cat cow crow deer dog donkey duck fox frog goat goose hare hen horse lizard mouse
    mule parrot pig rabbit raven sheep snake spider toad turtle wolf""")
FOODS = listed("""beans beer bread butter cake carrots cheese cherries cider corn dates figs fish grapes ham honey jam
    lemons milk mushrooms nuts pears peas plums porridge rice salt soup sugar tea""")
THINGS = listed("""ball basket bell boat book bottle box bucket candle carpet chair clock coat cup drum flute hammer hat
    key knife ladder lamp mirror needle plate ring rope spoon sword table""")
ADJECTIVES = listed("""black blue brown clean cold cracked dark dirty dry dusty flat golden green grey heavy large light
    little narrow new pale plain polished red round rusty sharp shiny silver small smooth soft strange warm wet white
    wide wooden yellow""")
# First names of the newcomers of the `facts` task, whom the base has never met.
NEWCOMER_NAMES = listed("""Anton Beatrix Cedric Daphne Edmund Felicia Gerald Harriet Ignatz Juliet Konrad Lavinia
    Manfred Odette Percy Rosalind Sigmund Tabitha Vincent Winifred""")
