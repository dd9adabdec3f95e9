"""Makes the demo's dataset: invented support tickets, each with the one line of JSON that a help desk would file.

Deterministic: the same seed gives the same bytes. The rows of the two files share no ticket.
"""

import argparse
import json
import random
from pathlib import Path

NAMES = [
    "Ada",
    "Alan",
    "Amara",
    "Anna",
    "Boris",
    "Carla",
    "Chen",
    "Dario",
    "Elif",
    "Emil",
    "Fatima",
    "Felix",
    "Greta",
    "Hana",
    "Hugo",
    "Ines",
    "Ivan",
    "Jamal",
    "Jonas",
    "Kaito",
    "Lena",
    "Leo",
    "Maja",
    "Marco",
    "Mei",
    "Nadia",
    "Nils",
    "Noor",
    "Olga",
    "Omar",
    "Paula",
    "Pedro",
    "Priya",
    "Quinn",
    "Rosa",
    "Samir",
    "Sofia",
    "Tariq",
    "Uma",
    "Vera",
    "Viktor",
    "Wanda",
    "Yara",
    "Yusuf",
    "Zoe",
]
PROBLEMS = {
    "login": ("cannot sign in to", "am locked out of"),
    "billing": ("was charged twice for", "need an invoice for"),
    "crash": ("get a crash when I open", "see an error screen in"),
    "slow": ("wait for minutes on", "see very slow pages in"),
    "feature": ("would like dark mode in", "miss an export button in"),
}
PRODUCTS = ("Atlas", "Beacon", "Comet", "Delta", "Ember", "Falcon", "Garnet", "Harbor")
URGENCIES = {
    "high": ("This is urgent.", "Please help at once."),
    "low": ("There is no hurry.", "Whenever you find time."),
}
OPENINGS = ("Hi, I am {name}.", "Hello, {name} here.", "My name is {name}.", "Good day, this is {name}.")


def make_ticket(source: random.Random) -> dict[str, str]:
    """One record in prompt-completion form."""
    name, product = source.choice(NAMES), source.choice(PRODUCTS)
    problem, urgency = source.choice(sorted(PROBLEMS)), source.choice(sorted(URGENCIES))
    order = source.randrange(1000, 10000)
    opening = source.choice(OPENINGS).format(name=name)
    text = (
        f"{opening} I {source.choice(PROBLEMS[problem])} {product} (order {order}). {source.choice(URGENCIES[urgency])}"
    )
    filed = {"customer": name, "product": product, "order": order, "issue": problem, "priority": urgency}
    return {"prompt": f"Ticket: {text}\nJSON:", "completion": " " + json.dumps(filed)}


def make_tickets(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different records."""
    source = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        ticket = make_ticket(source)
        found[ticket["prompt"]] = ticket
    return list(found.values())


def write_tickets(directory: Path, train: int, evaluation: int, seed: int) -> None:
    """Writes train.jsonl and eval.jsonl to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    tickets = make_tickets(train + evaluation, seed)
    for name, rows in (("train.jsonl", tickets[:train]), ("eval.jsonl", tickets[train:])):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line: ``python demo/tickets.py DIRECTORY``."""
    parser = argparse.ArgumentParser(description="Make the demo's dataset: DIRECTORY/train.jsonl and eval.jsonl.")
    parser.add_argument("directory", type=Path, help="directory to write to")
    parser.add_argument("--train", type=int, default=1200, help="records to train on (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=64, help="records held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the random choices (default: %(default)s)")
    arguments = parser.parse_args()
    write_tickets(arguments.directory, arguments.train, arguments.eval, arguments.seed)
    print(arguments.directory)


if __name__ == "__main__":
    main()
