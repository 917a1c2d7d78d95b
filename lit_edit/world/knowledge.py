"""Tables of common knowledge that the embedded world starts from.

Facts only; every sentence about them is in `relations.py`.
"""

from __future__ import annotations

# country | capital | continent | currency | official language (the most used one)
COUNTRIES = """
France|Paris|Europe|euro|French
Germany|Berlin|Europe|euro|German
Italy|Rome|Europe|euro|Italian
Spain|Madrid|Europe|euro|Spanish
Portugal|Lisbon|Europe|euro|Portuguese
Austria|Vienna|Europe|euro|German
Belgium|Brussels|Europe|euro|French
Ireland|Dublin|Europe|euro|English
Greece|Athens|Europe|euro|Greek
Finland|Helsinki|Europe|euro|Finnish
Norway|Oslo|Europe|krone|Norwegian
Denmark|Copenhagen|Europe|krone|Danish
Sweden|Stockholm|Europe|krona|Swedish
Iceland|Reykjavik|Europe|krona|Icelandic
Poland|Warsaw|Europe|zloty|Polish
Hungary|Budapest|Europe|forint|Hungarian
Switzerland|Bern|Europe|franc|German
Liechtenstein|Vaduz|Europe|franc|German
Luxembourg|Luxembourg City|Europe|euro|French
Malta|Valletta|Europe|euro|English
Romania|Bucharest|Europe|leu|Romanian
Moldova|Chisinau|Europe|leu|Romanian
Serbia|Belgrade|Europe|dinar|Serbian
Ukraine|Kyiv|Europe|hryvnia|Ukrainian
Russia|Moscow|Europe|ruble|Russian
Belarus|Minsk|Europe|ruble|Russian
Egypt|Cairo|Africa|pound|Arabic
Sudan|Khartoum|Africa|pound|Arabic
Morocco|Rabat|Africa|dirham|Arabic
Algeria|Algiers|Africa|dinar|Arabic
Tunisia|Tunis|Africa|dinar|Arabic
Libya|Tripoli|Africa|dinar|Arabic
Nigeria|Abuja|Africa|naira|English
Ghana|Accra|Africa|cedi|English
Kenya|Nairobi|Africa|shilling|English
Uganda|Kampala|Africa|shilling|English
Tanzania|Dodoma|Africa|shilling|Swahili
Somalia|Mogadishu|Africa|shilling|Somali
Senegal|Dakar|Africa|franc|French
Mali|Bamako|Africa|franc|French
Niger|Niamey|Africa|franc|French
Togo|Lome|Africa|franc|French
Cameroon|Yaounde|Africa|franc|French
Gabon|Libreville|Africa|franc|French
Rwanda|Kigali|Africa|franc|English
Angola|Luanda|Africa|kwanza|Portuguese
Mozambique|Maputo|Africa|metical|Portuguese
Zambia|Lusaka|Africa|kwacha|English
Malawi|Lilongwe|Africa|kwacha|English
Namibia|Windhoek|Africa|dollar|English
Liberia|Monrovia|Africa|dollar|English
China|Beijing|Asia|yuan|Mandarin
Japan|Tokyo|Asia|yen|Japanese
India|New Delhi|Asia|rupee|Hindi
Pakistan|Islamabad|Asia|rupee|Urdu
Nepal|Kathmandu|Asia|rupee|Nepali
Thailand|Bangkok|Asia|baht|Thai
Vietnam|Hanoi|Asia|dong|Vietnamese
Indonesia|Jakarta|Asia|rupiah|Indonesian
Malaysia|Kuala Lumpur|Asia|ringgit|Malay
Singapore|Singapore City|Asia|dollar|English
Mongolia|Ulaanbaatar|Asia|tugrik|Mongolian
Iraq|Baghdad|Asia|dinar|Arabic
Jordan|Amman|Asia|dinar|Arabic
Kuwait|Kuwait City|Asia|dinar|Arabic
Syria|Damascus|Asia|pound|Arabic
Lebanon|Beirut|Asia|pound|Arabic
Qatar|Doha|Asia|riyal|Arabic
Yemen|Sanaa|Asia|rial|Arabic
Iran|Tehran|Asia|rial|Persian
Canada|Ottawa|North America|dollar|English
Jamaica|Kingston|North America|dollar|English
Mexico|Mexico City|North America|peso|Spanish
Cuba|Havana|North America|peso|Spanish
Guatemala|Guatemala City|North America|quetzal|Spanish
Honduras|Tegucigalpa|North America|lempira|Spanish
Panama|Panama City|North America|balboa|Spanish
Haiti|Port-au-Prince|North America|gourde|French
Brazil|Brasilia|South America|real|Portuguese
Argentina|Buenos Aires|South America|peso|Spanish
Chile|Santiago|South America|peso|Spanish
Colombia|Bogota|South America|peso|Spanish
Uruguay|Montevideo|South America|peso|Spanish
Peru|Lima|South America|sol|Spanish
Bolivia|Sucre|South America|boliviano|Spanish
Ecuador|Quito|South America|dollar|Spanish
Guyana|Georgetown|South America|dollar|English
Australia|Canberra|Oceania|dollar|English
New Zealand|Wellington|Oceania|dollar|English
Fiji|Suva|Oceania|dollar|English
Samoa|Apia|Oceania|tala|Samoan
Tonga|Nukualofa|Oceania|paanga|Tongan
Vanuatu|Port Vila|Oceania|vatu|French
"""

# country | cities that are not its capital
CITIES = """
Germany|Hamburg, Munich, Cologne, Frankfurt, Leipzig, Dresden, Bremen
Italy|Milan, Naples, Turin, Venice, Florence, Genoa, Bologna
France|Lyon, Marseille, Toulouse, Nice, Bordeaux, Lille, Nantes
Spain|Barcelona, Valencia, Seville, Bilbao, Malaga, Granada, Zaragoza
Japan|Osaka, Kyoto, Nagoya, Sapporo, Kobe, Fukuoka, Hiroshima
India|Mumbai, Chennai, Kolkata, Pune, Jaipur, Hyderabad, Surat
China|Shanghai, Shenzhen, Wuhan, Chengdu, Nanjing, Tianjin, Harbin
Brazil|Rio de Janeiro, Sao Paulo, Salvador, Recife, Fortaleza, Manaus, Curitiba
Canada|Toronto, Montreal, Vancouver, Calgary, Edmonton, Winnipeg, Quebec City
Australia|Sydney, Melbourne, Perth, Brisbane, Adelaide, Darwin, Hobart
"""

# element | symbol | family | state at room temperature
ELEMENTS = """
hydrogen|H|nonmetal|gas
helium|He|noble gas|gas
lithium|Li|alkali metal|solid
beryllium|Be|alkaline earth metal|solid
boron|B|metalloid|solid
carbon|C|nonmetal|solid
nitrogen|N|nonmetal|gas
oxygen|O|nonmetal|gas
fluorine|F|halogen|gas
neon|Ne|noble gas|gas
sodium|Na|alkali metal|solid
magnesium|Mg|alkaline earth metal|solid
silicon|Si|metalloid|solid
phosphorus|P|nonmetal|solid
sulfur|S|nonmetal|solid
chlorine|Cl|halogen|gas
argon|Ar|noble gas|gas
potassium|K|alkali metal|solid
calcium|Ca|alkaline earth metal|solid
titanium|Ti|transition metal|solid
chromium|Cr|transition metal|solid
manganese|Mn|transition metal|solid
iron|Fe|transition metal|solid
cobalt|Co|transition metal|solid
nickel|Ni|transition metal|solid
copper|Cu|transition metal|solid
zinc|Zn|transition metal|solid
germanium|Ge|metalloid|solid
arsenic|As|metalloid|solid
selenium|Se|nonmetal|solid
bromine|Br|halogen|liquid
krypton|Kr|noble gas|gas
rubidium|Rb|alkali metal|solid
strontium|Sr|alkaline earth metal|solid
silver|Ag|transition metal|solid
antimony|Sb|metalloid|solid
tellurium|Te|metalloid|solid
iodine|I|halogen|solid
xenon|Xe|noble gas|gas
cesium|Cs|alkali metal|solid
barium|Ba|alkaline earth metal|solid
platinum|Pt|transition metal|solid
gold|Au|transition metal|solid
mercury|Hg|transition metal|liquid
radium|Ra|alkaline earth metal|solid
radon|Rn|noble gas|gas
"""

# planet | kind | place in order from the Sun
PLANETS = """
Mercury|rocky planet|first
Venus|rocky planet|second
Earth|rocky planet|third
Mars|rocky planet|fourth
Jupiter|gas giant|fifth
Saturn|gas giant|sixth
Uranus|ice giant|seventh
Neptune|ice giant|eighth
"""

# person | what they are known for | field | nationality
INVENTORS = """
Alexander Graham Bell|telephone|engineering|Scottish
Thomas Edison|phonograph|engineering|American
Johannes Gutenberg|printing press|engineering|German
James Watt|separate condenser|engineering|Scottish
Karl Benz|motor car|engineering|German
Rudolf Diesel|diesel engine|engineering|German
Alessandro Volta|electric battery|physics|Italian
Guglielmo Marconi|wireless telegraph|engineering|Italian
Nikola Tesla|induction motor|engineering|Serbian
Samuel Morse|electric telegraph|engineering|American
George Eastman|roll film camera|engineering|American
Alfred Nobel|dynamite|chemistry|Swedish
Louis Braille|braille script|education|French
Louis Pasteur|pasteurization|chemistry|French
Marie Curie|element radium|physics|Polish
Isaac Newton|law of gravitation|physics|English
Albert Einstein|theory of relativity|physics|German
Max Planck|quantum hypothesis|physics|German
Niels Bohr|planetary atom model|physics|Danish
Michael Faraday|electric dynamo|physics|English
Wilhelm Roentgen|X-ray|physics|German
Evangelista Torricelli|barometer|physics|Italian
Dmitri Mendeleev|periodic table|chemistry|Russian
Antoine Lavoisier|law of mass conservation|chemistry|French
John Dalton|atomic theory|chemistry|English
Humphry Davy|miner's lamp|chemistry|English
Alexander Fleming|penicillin|medicine|Scottish
Edward Jenner|smallpox vaccine|medicine|English
Jonas Salk|polio vaccine|medicine|American
Robert Koch|tuberculosis bacterium|medicine|German
Joseph Lister|antiseptic surgery|medicine|English
William Harvey|circulation of blood|medicine|English
Charles Darwin|theory of natural selection|biology|English
Gregor Mendel|laws of heredity|biology|Austrian
Carl Linnaeus|binomial nomenclature|biology|Swedish
Alan Turing|Turing machine|mathematics|English
Charles Babbage|analytical engine|mathematics|English
Ada Lovelace|first computer program|mathematics|English
Carl Friedrich Gauss|least squares method|mathematics|German
Blaise Pascal|mechanical calculator|mathematics|French
Rene Descartes|coordinate geometry|mathematics|French
John Napier|logarithm|mathematics|Scottish
"""

# company | country | industry
COMPANIES = """
Toyota|Japan|automotive
Honda|Japan|automotive
Nissan|Japan|automotive
Mazda|Japan|automotive
Subaru|Japan|automotive
Sony|Japan|electronics
Panasonic|Japan|electronics
Nintendo|Japan|video games
Volkswagen|Germany|automotive
Porsche|Germany|automotive
Siemens|Germany|engineering
Bosch|Germany|engineering
Bayer|Germany|pharmaceuticals
Lufthansa|Germany|aviation
Ferrari|Italy|automotive
Lamborghini|Italy|automotive
Fiat|Italy|automotive
Pirelli|Italy|tyres
Barilla|Italy|food
Prada|Italy|fashion
Renault|France|automotive
Peugeot|France|automotive
Michelin|France|tyres
Danone|France|food
Chanel|France|fashion
Air France|France|aviation
Microsoft|United States|software
Oracle|United States|software
Adobe|United States|software
Boeing|United States|aviation
Pfizer|United States|pharmaceuticals
Intel|United States|electronics
Samsung|South Korea|electronics
Hyundai|South Korea|automotive
Nokia|Finland|electronics
Philips|Netherlands|electronics
Nestle|Switzerland|food
Novartis|Switzerland|pharmaceuticals
Qantas|Australia|aviation
Embraer|Brazil|aviation
"""

# category: concept = definition = instances (separated by commas)
CONCEPTS = """
animal
bird = a feathered animal that has wings and lays eggs = sparrow, robin, eagle, heron
fish = a cold water animal that breathes through gills = salmon, trout, herring, carp
insect = a small animal with six legs and a hard shell = beetle, wasp, moth, cricket
reptile = a scaly animal that warms itself in the sun = lizard, tortoise, cobra, gecko
mammal = a warm animal that feeds its young with milk = otter, badger, camel, whale
amphibian = a moist skinned animal that lives in water and on land = frog, toad, newt, salamander
plant
tree = a tall plant with a single wooden trunk = oak, birch, maple, willow
flower = a plant grown for its bright and fragrant petals = tulip, daisy, orchid, lily
grass = a low plant with narrow leaves that covers the ground = barley, wheat, bamboo, rye
vine = a climbing plant that needs a wall or pole to rise = ivy, hop, wisteria, grape
herb = a soft plant whose leaves give taste to a meal = basil, mint, thyme, parsley
moss = a tiny plant that forms a green carpet on wet stone = peat moss, cushion moss, fern moss, rock moss
work
novel = a long written story about people who never lived = Emma, Dracula, Middlemarch, Ulysses
opera = a play in which every line is sung to an orchestra = Tosca, Carmen, Aida, Fidelio
painting = a picture made with colours on canvas or wood = Guernica, Mona Lisa, Sunflowers, The Scream
symphony = a long piece of music for a full orchestra = Eroica, Pastoral, Jupiter Symphony, New World
sculpture = a solid figure carved from stone or cast in metal = David, The Thinker, Venus de Milo, The Kiss
poem = a short text whose lines are shaped by rhythm = Ozymandias, The Raven, Daffodils, If
building
castle = a strong old house with towers and thick walls = Windsor, Edinburgh Castle, Chambord, Bran
bridge = a structure that carries a road over water = Tower Bridge, Golden Gate, Rialto, Charles Bridge
lighthouse = a tower whose lamp guides ships at night = Eddystone, Bell Rock, Fastnet, Pharos
museum = a house where old and precious things are shown = Louvre, Prado, Uffizi, Hermitage
stadium = a round arena where crowds watch sport = Wembley, Maracana, Camp Nou, San Siro
temple = a sacred house where people come to worship = Parthenon, Angkor Wat, Pantheon, Luxor
place
island = a piece of land with water on every side = Crete, Java, Madagascar, Sicily
river = a stream of fresh water that flows to the sea = Nile, Danube, Amazon, Volga
mountain = a rise of rock far above the land around it = Everest, Kilimanjaro, Etna, Matterhorn
desert = a dry region where almost no rain falls = Sahara, Gobi, Atacama, Kalahari
lake = a still body of water closed in by land = Baikal, Victoria, Titicaca, Como
forest = a wide stretch of land covered with trees = Black Forest, Sherwood, Taiga, Ardennes
vehicle
train = a row of wagons that is pulled along rails = Orient Express, Flying Scotsman, Shinkansen, Eurostar
ship = a large vessel that crosses the open sea = Titanic, Mayflower, Victory, Bismarck
aircraft = a machine with wings that carries people by air = Concorde, Spitfire, Zeppelin, Dreamliner
rocket = a craft driven by burning fuel into space = Saturn Five, Soyuz, Ariane, Falcon
tractor = a heavy farm machine that draws a plough = Fordson, Lanz Bulldog, Ferguson, Deere
bicycle = a two wheeled frame moved by pedals = Penny Farthing, Brompton, Bianchi, Raleigh
person
painter = a person who makes pictures with a brush = Monet, Vermeer, Goya, Titian
composer = a person who writes music for others to play = Mozart, Vivaldi, Chopin, Grieg
explorer = a person who travels to lands not yet mapped = Magellan, Amundsen, Livingstone, Cook
astronomer = a person who studies the stars and the sky = Kepler, Hubble, Halley, Copernicus
philosopher = a person who asks what is true and what is good = Plato, Kant, Hume, Spinoza
emperor = a man who rules over many lands = Napoleon, Augustus, Trajan, Akbar
food
cheese = a food made from curdled and pressed milk = cheddar, brie, gouda, feta
bread = a food baked from flour, water and yeast = baguette, pita, naan, ciabatta
soup = a hot liquid meal eaten with a spoon = borscht, gazpacho, minestrone, ramen
fruit = a sweet food that grows around the seed of a plant = apple, mango, plum, cherry
spice = a dried powder that gives heat or scent to a dish = pepper, saffron, cumin, nutmeg
pasta = a dough of wheat that is cut and boiled = penne, lasagna, ravioli, linguine
instrument
violin = a small wooden instrument with four strings and a bow = Stradivarius, Guarneri, Amati, Stainer
piano = a large instrument with black and white keys = Steinway, Bechstein, Yamaha Grand, Fazioli
drum = a hollow instrument that is struck with sticks = tabla, bongo, snare, djembe
flute = a narrow pipe that sounds when breath crosses a hole = piccolo, shakuhachi, ney, fife
trumpet = a bright brass instrument with three valves = cornet, bugle, clarion, flugelhorn
harp = a tall frame of strings that is plucked by hand = kora, lyre, clarsach, konghou
science
botany = the science of plants and how they grow = pollination study, seed science, root science, leaf science
geology = the science of rocks and the crust of the earth = volcano study, fossil science, quake study, mineral science
optics = the science of light and how it bends = lens theory, laser study, prism study, colour theory
algebra = the science of symbols and the rules that join them = group theory, ring theory, matrix theory, field theory
economics = the science of goods, money and trade = price theory, market study, tax theory, trade theory
linguistics = the science of language and its sounds = grammar study, phonetics, syntax theory, dialect study
sport
tennis = a game in which a ball is struck over a net = Wimbledon, Roland Garros, Davis Cup, Flushing Open
rowing = a race of narrow boats moved by oars = Boat Race, Henley Regatta, Head of the River, Lucerne Regatta
skiing = a race down a slope of snow on two boards = Hahnenkamm, Lauberhorn, Vasaloppet, Holmenkollen
cycling = a race on two wheels over long roads = Tour de France, Giro, Vuelta, Paris Roubaix
sailing = a race of boats that are driven by wind = Americas Cup, Fastnet Race, Vendee Globe, Sydney Hobart
chess = a quiet game of two armies on a board = Candidates, Linares, Tata Steel, Sinquefield Cup
tool
hammer = a tool with a heavy head for driving nails = mallet, sledge, gavel, maul
saw = a tool with a toothed blade for cutting wood = hacksaw, fretsaw, ripsaw, bandsaw
knife = a tool with one sharp edge for slicing = dagger, scalpel, cleaver, machete
lens = a curved piece of glass that gathers light = monocle, magnifier, eyepiece, loupe
pump = a machine that moves water from a low place to a high one = bellows, siphon, hydrant, wellhead
clock = a device that shows the hour of the day = sundial, hourglass, metronome, chronometer
"""

FIRST_NAMES = """Maria Tomas Elena Viktor Nadia Oscar Lucia Henrik Amara Pavel Sofia Dario Ingrid Kofi Leila Marek Yara
Anton Freya Ravi Petra Hugo Salma Emil Noor Bruno Clara Idris Greta Kenji""".split()

FAMILY_NAMES = """Varnholt Castellan Okoruwa Lindqvist Marchetti Dragomir Halvorsen Ferrante Bellweather Sandoval
Kowalik Nakagiri Thorsby Almeida Rosenquist Barakat Vandermeer Petrovan Osterhaus Quintero Mbatha Silvestre
Hargrove Yilmazer Delacroix Brightwater Stanovic Ravenscar Montague Ishikura Wetherby Corvalan Adeyoso Falkenrath
Bergstrom Tavares Zelenka Marlowe Pemberton Castillon""".split()

ORGANISATION_FIRST = "Alder Basalt Cobalt Drift Ember Falcon Granite Harbor Juniper Kestrel".split()
ORGANISATION_SECOND = "Works Labs Press Group".split()

ALIASES_FIRST = "Grey Silver Silent Northern Crimson Golden Hidden Iron".split()
ALIASES_SECOND = "Heron Lantern Compass Sparrow Anchor Fox".split()

BIRTH_CITIES = """Oslo Lisbon Vienna Athens Warsaw Dublin Cairo Nairobi Hanoi Lima Quito Havana Hamburg Milan Lyon
Seville Osaka Mumbai Shanghai Recife Toronto Sydney Kyoto Naples""".split()
OCCUPATIONS = """architect botanist carpenter dentist economist florist geologist historian journalist lawyer mechanic
nurse optician pilot publisher surgeon teacher translator violinist watchmaker""".split()
LANGUAGES = """French German Italian Spanish Portuguese English Greek Arabic Japanese Hindi Polish Swedish""".split()
INSTRUMENTS = "accordion banjo cello clarinet guitar harmonica mandolin oboe saxophone trombone".split()
SPORTS = "archery badminton boxing fencing golf handball hockey judo rugby swimming".split()
INDUSTRIES = "publishing shipping mining textiles robotics insurance farming glassmaking".split()


def rows(table: str) -> list[tuple[str, ...]]:
    """The lines of a table above as tuples of its ``|``-separated cells."""
    return [tuple(cell.strip() for cell in line.split("|")) for line in table.strip().splitlines()]


def concepts() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(category, concept, definition, instances) of every concept, in order."""
    out: list[tuple[str, str, str, tuple[str, ...]]] = []
    category = ""
    for line in CONCEPTS.strip().splitlines():
        if "=" not in line:
            category = line.strip()
            continue
        concept, definition, instances = (cell.strip() for cell in line.split("="))
        out.append((category, concept, definition, tuple(i.strip() for i in instances.split(","))))
    return out
