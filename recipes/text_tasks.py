"""Tasks in words, for models that can read: recipes/pretrained.py trains on them.

Each has prompt(rng) -> (text, key) and check(key, answer) -> score, as llm_rlvr.py's tasks have,
and no guess: a pretrained model needs no warm start. check is a reward for any other trainer.
"""
import json
import random
import re
import sys
from copy import copy
from decimal import Decimal
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from answers import final_lines, final_number, number_or_text
from llm_rlvr import TASKS, fail, hash_split
from rg_score import Scorer


def read_jsonl(path, name, read, form):
    """{text: answer} of the lines {name: text, "answer": answer} whose answer read does not make
    None; the others are left out."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        fail(f"--data {path}: cannot be read ({error.strerror})")
    found, bad = {}, []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_float=Decimal, parse_int=Decimal)      # 1e-05 is .00001
            text, answer = row[name], row["answer"]
            fine = text.encode().strip() and read(answer) is not None
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            fine = False
        if fine:
            found[text] = answer
        elif line.strip():
            bad.append(str(number))
    form = f'{{"{name}": text, "answer": {form}}}'
    if bad:
        more = " ..." if len(bad) > 10 else ""
        print(f"{path}: left out {len(bad)} of {len(lines)} lines, which are not {form}: "
              f"{', '.join(bad[:10])}{more}", file=sys.stderr)
    return found or fail(f"--data {path}: has no line {form}")


def solution(answer):
    return final_number(answer) if "####" in answer else None


class Gsm8k:
    """School math in words (Cobbe et al., arXiv 2110.14168). A tenth of train.jsonl is heldout."""

    def __init__(self, folder, shots):
        files = (Path(folder) / name for name in ("train.jsonl", "test.jsonl"))
        train, test = (read_jsonl(path, "question", solution, "text with #### number")
                       for path in files)
        part = {q: "heldout" if hash_split(q) == "heldout" else "train" for q in train}
        part |= dict.fromkeys(test, "test")
        shown = [q for q in part if part[q] == "train"][:shots]    # in every prompt: not asked
        ask = "Question: {}\nAnswer:".format
        head = 'Think step by step and end with "The answer is N."\n\n'
        for q in shown:
            steps, _, n = re.sub("<<.*?>>", "", train[q]).rpartition("####")
            head += f"{ask(q)} {steps.strip()}\nThe answer is {n.strip()}.\n\n"
            del part[q]
        answers = train | test
        self.items = [(head + ask(q), final_number(a)) for q, a in answers.items() if q in part]
        self.split = {head + ask(q): split for q, split in part.items()}.get

    def prompt(self, rng):
        return rng.choice(self.items)

    def check(self, key, answer):
        return float(final_number(answer) == key)


class Jsonl:
    """Lines {"prompt": text, "answer": text or number}. Numbers compare by value; a text of one
    line with the last line, one of several with all of them behind the last "answer:"."""

    def __init__(self, path):
        lines = read_jsonl(path, "prompt", number_or_text, "text or number")
        self.items = [(text, number_or_text(answer)) for text, answer in lines.items()]

    def prompt(self, rng):
        return rng.choice(self.items)

    def check(self, key, answer):
        if isinstance(key, Decimal):
            return float(final_number(answer) == key)
        several = len(key.strip().splitlines()) > 1
        return float(final_lines(answer, several) == final_lines(key, several))


class ReasoningGym:
    """A dataset of Reasoning Gym (arXiv 2505.24760), its prompts and scores; entry i has seed i."""

    def __init__(self, name):
        try:
            import reasoning_gym
        except ImportError:
            fail(f"--task rg:{name} needs reasoning-gym: pip install reasoning-gym")
        # acre is made whole at once, word_ladder has this limit
        self.size = 20_000 if name in ("acre", "word_ladder") else 10**6
        try:
            self.data = reasoning_gym.create_dataset(name, seed=0, size=self.size)
        except (ValueError, AssertionError) as error:
            fail(f"--task rg:{name}: {error}; allowed: keys of reasoning_gym.factory.DATASETS")
        self.scorer = Scorer(name)

    def prompt(self, rng):
        entry = self.data[rng.randrange(self.size)]
        return f"{entry['question'].strip()}\nPut the final answer inside <answer></answer>.", entry

    def check(self, key, answer):
        before, closed, _ = answer.rpartition("</answer>")
        _, opened, tagged = before.rpartition("<answer>")
        return self.scorer.score((tagged if closed and opened else answer).strip(), key)


@cache
def make_task(name, data, shots):
    """The task of that name, always the same instance."""
    if name not in (*TASKS, "gsm8k", "jsonl") and not name.startswith("rg:"):
        fail(f"--task {name}: allowed are gsm8k, jsonl, rg:NAME, {', '.join(TASKS)}")
    form = {"gsm8k": "FOLDER", "jsonl": "FILE.jsonl"}.get(name)
    if form and not data:
        fail(f"--task {name}: needs --data {form}")
    if data and not form:
        fail(f"--data {data}: goes with --task gsm8k or jsonl, not with {name}")
    if shots < 0 or shots and name != "gsm8k":
        fail(f"--shots {shots}: allowed are 0 or more, and with gsm8k alone")
    if name in TASKS:
        task = copy(TASKS[name])
        task.defaults = {}                      # its own are for the small GPT
        return task
    if name == "gsm8k":
        return Gsm8k(data, shots)
    return Jsonl(data) if name == "jsonl" else ReasoningGym(name.removeprefix("rg:"))


def leave_out_long(task, encode, room):
    """Take from a task the prompts of more than room tokens, and tell how many there are."""
    # make_task gives every run the same instance: what an earlier one put round prompt stays out
    task.draw = draw = getattr(task, "draw", task.prompt)
    rng = random.Random(0)
    endless = not hasattr(task, "items")
    items = [draw(rng) for _ in range(100)] if endless else task.items
    lengths = [len(encode(text)) for text, _ in items]
    long = sum(length > room for length in lengths)
    told = (f"--max-new-tokens leaves {room} tokens of the model's context to a prompt: {long} of "
            f"{len(items)} are longer, the longest has {max(lengths)}")
    if long == len(items):
        fail(told)
    if long:
        print(f"{told}; they are left out", file=sys.stderr)

    def prompt(rng):
        while True:
            text, key = draw(rng)
            if len(encode(text)) <= room:
                return text, key

    if endless:
        task.prompt = prompt
    else:
        task.items = [item for item, length in zip(items, lengths) if length <= room]
