"""Tasks in words, for models that can read: recipes/pretrained.py trains on them.

Each has prompt(rng) -> (text, key) and check(key, answer) -> score, as llm_rlvr.py's tasks have,
and no guess: a pretrained model needs no warm start. check is a reward for any other trainer.
"""
import json
import re
import sys
from copy import copy
from decimal import Decimal
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from llm_rlvr import TASKS, fail, hash_split

# the minus of 5-3 is no sign
NUMBER = r"(?:(?<![\w)])[-\u2212])?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
MARK = r"####|\\boxed\{|answer(?: is|\W{0,2}:)"


def final_number(text):
    r"""The number after the last ####, \boxed{, "answer is" or "answer:", else the text's last."""
    text = text.replace("{,}", ",")                                       # LaTeX writes 1{,}080
    *before, tail = re.split(MARK, text, flags=re.IGNORECASE)
    numbers = before and re.findall(NUMBER, tail)[:1] or re.findall(NUMBER, text)[-1:]
    return Decimal(re.sub("[$,]", "", numbers[0]).replace("\u2212", "-")) if numbers else None


def final_line(text):
    line = (text.strip().splitlines() or [""])[-1]
    return line.strip().casefold().removeprefix("answer:").strip()


def read_jsonl(path, name, wanted, form):
    """{text: answer} of the lines {name: text, "answer": answer}; the others are left out."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        fail(f"--data {path}: cannot be read ({error.strerror})")
    found, bad = {}, []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            text, answer = row[name], row["answer"]
            fine = text.encode().strip() and type(answer) in (str, int, float)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fine = False
        if fine and re.search(wanted, str(answer)):
            found[text] = str(answer)
        elif line.strip():
            bad.append(str(number))
    form = f'{{"{name}": text, "answer": {form}}}'
    if bad:
        more = " ..." if len(bad) > 10 else ""
        print(f"{path}: left out {len(bad)} of {len(lines)} lines, which are not {form}: "
              f"{', '.join(bad[:10])}{more}", file=sys.stderr)
    return found or fail(f"--data {path}: has no line {form}")


class Gsm8k:
    """School math in words (Cobbe et al., arXiv 2110.14168). A tenth of train.jsonl is heldout."""
    defaults = {}

    def __init__(self, folder, shots):
        files = (Path(folder) / name for name in ("train.jsonl", "test.jsonl"))
        solved = r"####\s*" + NUMBER, "text with #### number"
        train, test = (read_jsonl(path, "question", *solved) for path in files)
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
    """Lines {"prompt": text, "answer": text or number}: numbers compare by value, text by the last
    line."""
    defaults = {}

    def __init__(self, path):
        self.items = list(read_jsonl(path, "prompt", r"\S", "text or number").items())

    def prompt(self, rng):
        return rng.choice(self.items)

    def check(self, key, answer):
        read = final_number if re.fullmatch(NUMBER, key.strip()) else final_line
        return float(read(answer) == read(key))


class ReasoningGym:
    """A dataset of Reasoning Gym (arXiv 2505.24760), its prompts and scores; entry i has seed i."""
    defaults = {}

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

    def prompt(self, rng):
        entry = self.data[rng.randrange(self.size)]
        return f"{entry['question'].strip()}\nPut the final answer inside <answer></answer>.", entry

    def check(self, key, answer):
        tagged = re.findall("<answer>(.*?)</answer>", answer, re.DOTALL)
        try:
            return float(self.data.score_answer((tagged or [answer])[-1].strip(), key))
        except Exception:                        # some raise on an answer that they cannot read
            return 0.0


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
