"""pytest: the mathematics of the losses, then each script's behaviour, run as a user runs it."""
import gzip
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from runpy import run_path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bandit
import baselines
import llm_rlvr
import seqtask
import tpo
from baselines import METHODS
from tpo import standardize, tpo_loss, tpo_target, tpo_weights

ROOT = Path(tpo.__file__).parent
F64 = dict(dtype=torch.float64)
close = torch.testing.assert_close
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def grad(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def logged(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def table(text):
    """Rows, each on its line or behind a semicolon, of cells between bars."""
    return [row.strip().split(" | ") for row in re.split("[;\n]", text.strip())]


def one_line(capsys, words, call, *arguments, status=2):
    """The call ends the program with this status and one line on stderr with all the words."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = capsys.readouterr().err
    assert stop.value.code == status and message.count("\n") == 1, message
    assert all(word in message for word in words.split()), message


def run_script(name, *flags, pipe=""):
    """The finished process of a script in a shell whose locale has nothing but ASCII."""
    command = shlex.join(map(str, (sys.executable, ROOT / name, *flags))) + pipe
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), LC_ALL="C", PYTHONUTF8="0",
                            PYTHONIOENCODING="ascii")
    return subprocess.run(command, shell=True, text=True, capture_output=True, timeout=120, env=env)


@each("script", [bandit, seqtask, llm_rlvr])
def test_script_explains_its_flags_and_refuses_others(script, capsys):
    name, flags = Path(script.__file__).name, [f.name for f in fields(script.Config)]
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and all("--" + f.replace("_", "-") in text for f in flags)
    process = run_script(name, "--banana")
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"{name}: --banana is not a flag; the flags are --")


REFUSED = {bandit: """
--task double | double single, multi, mnist; --algo tpo,ppo | tpo,ppo group_pg
--task single --algo ce | --algo ce: pg, grpo, dg, tpo; --tasks single | --task --eta
--seeds 0 | 0: from 1; --seeds many | many: from 1; --steps -1 | -1: from 1; --mechanism | mnist
--eta 0.009 | 0.009: from 0.01; --eta nan | nan: from 0.01; --eta inf | inf: finite
--out no/such/log | no/such/log: folder; --out / | /: folder; --out pipe | pipe: files
--plot figure.pdf | figure.pdf: .png
""", seqtask: """
--algo tpo_token | tpo_token --reward terminal; --reward dense | dense: bag, sequential, terminal
--algo maxrl --reward bag | maxrl --reward bag: terminal; --candidates 1 --algo dg,grpo | 1 grpo
--length 0 | 0: whole from; --vocab x | x: whole; --seeds 1.5 | 1.5 int; --eta 9e-7 | from 1e-06
--lr nan | nan: finite; --preset table9, --preset table3,fig8 | table1, table2
--device tpu, --device cpu,cpu | cpu
--epoch 3 | not a flag --epochs; --diagnostics --algo dg | dg: allowed tpo
""", llm_rlvr: """
--steps 0, --prompts 0, --candidates 0, --epochs 0, --eval-every 0, --layers 0, --width 0 | 1 to inf
--eval-puzzles 0, --max-new-tokens 0, --heads 0, --kv-heads 0, --micro-tokens 0 | 1 to inf
--warm-steps -1 | 0 to inf; --task chess | graph_color, addition; --algo dpo | tpo, grpo
--algo tpo, | tpo, grpo; --eval-set train | heldout, test
--seed -1, --seed 9223372036854775808 | 0 to 9
--candidates 1, --candidates 1 --algo dapo | 2 or more; --lr 0, --lr nan, --lr inf | 1e-12 to
--lr fast | invalid float; --eta 9e-7, --eta 1.1e6 | 1e-06 to 1e+06
--anchor -0.1, --anchor nan, --anchor inf | 0 to 1e+06; --banana, --alg tpo | is not a flag --algo
--width 36 | multiples --kv-heads; --kv-heads 3 | --width --heads
--device meta, --device tpu9 | cpu, cuda:N; --out file, --out pipe | written
"""}


@each("script, flags, words", [(script, flags, words) for script, text in REFUSED.items()
                               for some, words in table(text) for flags in some.split(", ")])
def test_wrong_flags_are_one_line(script, flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.mkfifo("pipe")
    one_line(capsys, f"{flags.split()[0]} {words}", script.main, flags.split())


# ---- tpo.py --------------------------------------------------------------------------------------

@each("settings", [(), (0.7, 0.0), (0.7, 0.25), (0.7, 2.0)])
def test_gradient_is_p_minus_q_and_every_anchor_has_the_same_fixed_point(settings):
    eta, anchor = settings or (1.0, 1.0)                      # the defaults are the paper's
    inputs = logp, logp_old, scores = [x.requires_grad_() for x in torch.rand(3, 4, 3, 6, **F64)]
    loss = tpo_loss(*inputs, *settings)
    loss.backward()
    assert logp_old.grad is None and scores.grad is None
    fixed = logp_old.detach() + standardize(scores) / eta
    p, q = ((l - (1 - anchor) * logp_old).detach().softmax(-1) for l in (logp, fixed))
    close(tpo_target(logp_old, scores, *settings), q)
    close(loss.detach(), -(q * p.log()).sum(-1).mean())
    close(logp.grad, (p - q) / 12)
    weights = tpo_weights(*inputs, *settings)
    close(weights, (p - q) / 12)
    assert not weights.requires_grad and not tpo_target(logp_old, scores, *settings).requires_grad
    assert tpo_weights(fixed - 3, logp_old, scores, *settings).abs().max() < 1e-16


@each("scores, expected", table("""
[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1] | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
[0.3333333333333333, 0.3333333333333333, 0.33333333333333337] | [0, 0, 0]
[1.0, 1.000000001] | [0, 0]; [1.0, 0.999999] | [0, 0]; [1.0, 0.999997] | [1, -1]
[0.0, 0.0] | [0, 0]; [7.0] | [0]; [1e30, -1e30] | [1, -1]; [1e-30, 0.0] | [1, -1]
[true, false] | [1, -1]
[0, 0.001, 0, 0, 0] | [-0.5, 2, -0.5, -0.5, -0.5]
[1e5, 100001, 1e5, 1e5, 1e5] | [-0.5, 2, -0.5, -0.5, -0.5]; [1e6, 1000001, 1e6] | [0, 0, 0]
[-1e5, -99999, -1e5, -1e5, -1e5] | [-0.5, 2, -0.5, -0.5, -0.5]
"""))
@each("dtype", [None, torch.float64])
def test_standardize_tells_signal_from_noise(scores, expected, dtype):
    u = standardize(torch.tensor(json.loads(scores), dtype=dtype))
    expected = torch.tensor(json.loads(expected), dtype=u.dtype)
    assert u.allclose(expected) if expected.any() else torch.equal(u, expected)


@each("anchor", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_group_of_equal_scores_rests_to_the_last_bit(anchor):
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for eta, kind, other in itertools.product([0.3, 1], dtypes, dtypes):      # 10,240 groups
        scores, logp = torch.rand(64, 1), -9 * torch.randn(64, torch.randint(1, 20, ())).exp()
        scores, logp = scores.expand_as(logp).to(other), logp.to(kind)
        for mask in None, torch.rand(logp.shape) < 0.7:
            assert not tpo_weights(logp, logp.clone(), scores, eta, anchor, mask).any()


@each("anchor", [0.0, 0.3, 1.0])
def test_masked_candidates_might_as_well_not_exist(anchor):
    logp, logp_old, scores = torch.rand(3, 2, 6, **F64)
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    known = logp_old.masked_fill(~mask, math.nan), scores.masked_fill(~mask, math.inf), 0.7, anchor
    kept = tpo_weights(logp[mask], logp_old[mask], scores[mask], 0.7, anchor)
    expected = torch.zeros(2, 6, **F64).masked_scatter(mask, kept)
    close(tpo_weights(logp, *known, mask), expected)
    assert (tpo_target(*known, mask)[~mask] == 0).all()


@each("anchor", [0.0, 0.25, 1.0])
@each("extreme", [-1e4, -math.inf])
def test_extreme_old_log_probs_stay_finite(anchor, extreme):
    logp_old = torch.tensor([[extreme, -1, -2, extreme], [extreme] * 4, [extreme, 0, extreme, -9]])
    scores = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1e30, 0, 0, 0]])
    logp = torch.zeros(3, 4, requires_grad=True)
    loss = tpo_loss(logp, logp_old, scores, anchor=anchor)
    assert loss.isfinite() and grad(loss, logp).isfinite().all()
    close(tpo_target(logp_old, scores, anchor=anchor).sum(-1), torch.ones(3))
    assert tpo_loss(torch.tensor([[-math.inf, 0]]), *torch.zeros(2, 1, 2)) == 5e8   # -inf: -1e9
    p = tpo_weights(torch.arange(4.0), torch.full((4,), -math.inf), torch.zeros(4)) + 0.25
    close(p, torch.arange(4.0).softmax(-1))                   # such old ones do not drown the new


@each("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_score_is_loud(bad):
    scores, zeros = torch.tensor([[1.0, bad, 0], [1, 0, 0]]), torch.zeros(2, 3)
    assert tpo_target(zeros, scores).isnan().all(-1).tolist() == [True, False]
    assert tpo_loss(zeros, zeros, scores).isnan()


def test_readme_shows_the_code_of_tpo_py():
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = (ROOT / "tpo.py").read_text(encoding="utf-8")
    assert "def tpo_loss" in shown and all(part.strip() in code for part in shown.split("\n\n\n"))


# ---- baselines.py --------------------------------------------------------------------------------

LENGTHS = torch.tensor([[1, 4, 2, 5], [4, 2, 5, 3], [0, 5, 0, 1], [0, 0, 2, 0], [0, 0, 0, 0]])
TOKENS = torch.arange(5) < LENGTHS[..., None]                 # (B, K, T)
THERE = LENGTHS > 0                                           # (B, K); group 3: one, group 4: none
SCORES = torch.tensor([[1, 0.2, 0, 0.7], [0.1] * 4, [9, 3, 2, 2], [0.5] * 4, [4, 3, 2, 1]], **F64)
USUAL = dict(eta=1.0, anchor=1.0, length=1, clip=0.2, beta=0.04, b1=1.0, b2=1e-3, keep=0.03,
             cap=5.0, limit=8.0)
OTHER = dict(eta=0.7, anchor=0.4, length=7, clip=0.1, beta=0.3, b1=0.5, b2=0.2, keep=0.3,
             cap=1.3, limit=1.6)


def clipped(delta, A, low, high):
    """The surrogate, summed: past the bound to which A leads, rho is a constant."""
    rho = delta.clamp(-20, 20).exp()
    stopped = (A > 0) & (rho > 1 + high) | (A < 0) & (rho < 1 - low)
    rho = rho.where(~stopped, rho.detach().clamp(1 - low, 1 + high))
    return (rho * A).sum()


def tpo_by_hand(s, z, anchor):
    return -(anchor + s.U / s.eta).softmax(-1)[s.i] * z.log_softmax(-1)[s.i]


def grpo_by_hand(s, delta, beta):
    r = delta.clamp(-20, 20)
    return beta * (torch.exp(-r) + r - 1).sum() - clipped(r, s.u, s.clip, s.clip)


rloo_by_hand = lambda s: -s.c * s.N / max(1, s.N - 1) * s.l
weight = lambda delta, bound: delta.detach().clamp(-20, 20).exp().clamp(max=bound)

# What the loss of a sample is divided by, and that loss. x, d, A (n,): its tokens' log-probs,
# log-ratios and advantages over the batch. l, delta, r, c, u: its summed log-prob and log-ratio,
# its score, centred and standardized in its group of N. L, O, R, U (N,): log-probs, old ones,
# scores and standardized scores of that group, in which it has place i. D = L - O, P = softmax(D).
BY_HAND = {
    "tpo": ("groups", lambda s: tpo_by_hand(s, s.L - (1 - s.anchor) * s.O, s.anchor * s.O)),
    "tpo_no_anchor": ("groups", lambda s: tpo_by_hand(s, s.L, 0)),
    "lpo": ("groups", lambda s: tpo_by_hand(s, s.L - s.O, 0)),
    "lpo_rev": ("groups", lambda s: (s.P * (s.P / (s.U / s.eta).softmax(-1)).log())[s.i]),
    "group_pg": ("groups", lambda s: -s.u * s.l),
    "grpo": ("groups", lambda s: grpo_by_hand(s, s.delta, s.beta)),
    "grpo_no_kl": ("groups", lambda s: grpo_by_hand(s, s.delta, 0)),
    "grpo_masked": ("mixed groups", lambda s: grpo_by_hand(s, s.delta, s.beta) * (s.u != 0)),
    "rloo": ("groups * N", rloo_by_hand),
    "vcpo": ("groups * N", lambda s: weight(s.delta, s.limit) * rloo_by_hand(s)),
    "maxrl": ("groups * N", lambda s: -s.c / s.R.mean().clamp(min=1e-9) * s.l),
    "rebel": ("pairs", lambda s: ((s.delta - s.D) / s.eta - (s.r - s.R))[:s.i].square().sum()),
    "oapl": ("groups * N", lambda s: (s.b2 * s.delta - s.r + s.b1
                                      * (s.R / s.b1).exp().mean().log()).square()),
    "pg": ("samples", lambda s: -(s.A * s.x).sum()),
    "ppo": ("samples", lambda s: -clipped(s.d, s.A, s.clip, s.clip)),
    "dg": ("samples", lambda s: -(s.A * s.x / (1 + (s.A * s.x.detach() / s.eta).exp())).sum()),
    "kondo": ("samples", lambda s: -(s.A * s.x).sum() * s.best),
    "grpo_token_ratio": ("samples * n", lambda s: grpo_by_hand(s, s.d, s.beta)),
    "dr_grpo": ("samples", lambda s: -clipped(s.d, s.c, s.clip, s.clip) / s.length),
    "dapo": ("tokens", lambda s: -clipped(s.d, s.u, 0.2, 0.28)),
    "gspo": ("samples", lambda s: -clipped(s.d.mean(), s.u, 3e-4, 4e-4)),
    "cispo": ("tokens", lambda s: -s.u * (weight(s.d, s.cap) * s.x).sum())}
BY_HAND["ddpg"] = BY_HAND["dg"]


def by_hand(name, l, old, r, settings):
    """The loss of a batch, sample by sample. l, old (B, K, T), r (B, K) or (B, K, T)."""
    reach = TOKENS if r.ndim == 3 else THERE[..., None]
    r = r if r.ndim == 3 else r[..., None]
    A = (r - (r * reach).sum((0, 1)) / reach.sum((0, 1))) * TOKENS
    delight = -(A * l).sum(-1).detach()
    bar = delight[THERE].topk(max(1, int(settings["keep"] * 11))).values[-1]
    count, loss = BY_HAND[name]
    total = 0
    for b, k in THERE.nonzero().tolist():
        n, here = TOKENS[b, k], THERE[b]
        L, O = ((x[b] * TOKENS[b]).sum(-1)[here] for x in (l, old))
        R, N, i = r[b, here, 0], here.sum().item(), here[:k].sum().item()
        C = R - R.mean()
        U = C / R.std(correction=0) if C.abs().max() > 1e-9 else 0 * C
        s = SimpleNamespace(**settings, x=l[b, k, n], d=(l - old)[b, k, n], A=A[b, k, n], l=L[i],
                            delta=(L - O)[i], r=R[i], c=C[i], u=U[i], L=L, O=O, R=R, U=U, N=N, i=i,
                            D=L - O, P=(L - O).softmax(-1), best=delight[b, k] >= bar)
        total = total + loss(s) / {"groups": 4, "groups * N": 4 * N, "mixed groups": 2,
                                   "pairs": 4 * max(1, N * (N - 1) / 2), "samples": 11,
                                   "samples * n": 11 * n.sum(), "tokens": 34}[count]
    return total


def accepted(method):
    """The settings that the loss takes, but for those that make it the method."""
    fixed = getattr(method.loss, "keywords", {}).keys()
    return OTHER.keys() & inspect.signature(method.loss).parameters.keys() - fixed


@each("shift", [0, 1e-3, 0.3, 2])                             # on policy, then around the clips
@each("settings", [USUAL, OTHER], ids=["usual", "other"])
@each("name", METHODS)
def test_losses_are_their_formulas_whatever_stands_behind_the_mask(name, settings, shift):
    method = METHODS[name]
    given = {key: settings[key] for key in accepted(method) if settings is OTHER}
    l, noise = torch.randn(2, 5, 4, 5, **F64)
    old = l - 1 - shift * noise
    if shift == 2:                                            # log-ratios are cut at -20 and 20
        old[0, 0, 0], old[0, 2, 0] = 50, -50
    l = (l - 1).requires_grad_()
    inputs, mask = (l, old), TOKENS
    if method.per == "group":
        inputs, mask = ((x * TOKENS).sum(-1) for x in inputs), THERE
    scores = [(SCORES % 2 == 1).double() if name == "maxrl" else SCORES]
    if method.per == "sample":
        scores.append(torch.rand(5, 4, 5, **F64))             # of each token
    hide = lambda x: x.masked_fill(~(TOKENS if x.ndim == 3 else THERE), math.nan)
    hidden = [hide(x) for x in inputs]
    for r in scores:
        value = method.loss(*hidden, hide(r), **given, mask=mask)
        expected = by_hand(name, l, old, r, settings)
        close(value, expected, rtol=1e-9, atol=1e-12)
        close(grad(value, l), grad(expected, l), rtol=1e-9, atol=1e-12)


@each("name", METHODS)
def test_methods_are_what_their_table_says(name):
    method = METHODS[name]
    loss = method.bind(**OTHER)
    assert set(method.takes) == {"eta", "anchor", "length", "clip", "beta"} & accepted(method)
    assert loss.keywords.items() >= {key: OTHER[key] for key in method.takes}.items()
    logp = torch.randn((3, 7) if method.per == "group" else (3, 7, 5), **F64)
    logp[0] -= 9                                              # of large delight: kondo keeps it
    old, other = logp.clone(), torch.randn_like(logp)
    logp.requires_grad_()
    mixed = torch.tensor([[1.0] * 7, [0] * 6 + [1], [0] * 7], **F64)
    equal = torch.full((3, 7), 0.3, **F64)
    moves = lambda g: g.abs().max().item() > 1e-12
    first, later = (grad(loss(logp, l, mixed), logp) for l in (old, other))
    assert moves(first) and moves(first[0]) != method.rests
    assert moves(grad(loss(logp, other, equal), logp)) == method.pulls
    if method.rests and name not in ("tpo", "lpo"):           # to the last bit, as tpo_weights does
        assert not grad(loss(logp, old, equal), logp).any()
    assert method.epochs == (4 if moves(later - first) or name == "tpo_no_anchor" else 1)
    nothing = loss(logp, other, mixed, mask=torch.zeros_like(logp, dtype=torch.bool))
    assert nothing == 0 and not grad(nothing, logp).any()
    with pytest.raises(ValueError, match=r"\(2, 4.*\(2, 3"):
        method.loss(*[torch.zeros(2, 4)] * 3, mask=torch.ones(2, 3, dtype=torch.bool))
    inputs = [x.float() for x in (logp, other, mixed)]
    if name != "maxrl":                                       # no digits lost in an offset
        close(loss(*inputs[:2], inputs[2] + 1e5), loss(*inputs), rtol=1e-5, atol=1e-6)


def test_docstring_of_baselines_lists_the_methods():
    lines = baselines.__doc__[baselines.__doc__.index("\nname  "):].split("\n\n")[0]
    assert re.findall(r"^(\w+) ", lines, re.MULTILINE)[1:] == list(METHODS)


WRONG = {"group": ["24 21 24", "24 24 21", "24 24 4", "21 24 24", "04 04 04", "20 20 20"]}
WRONG["sample"] = [*WRONG["group"], "234 234 231", "234 234 24", "234 234 2341", "234 234 34"]
WRONG["token"] = [*WRONG["sample"], "234 234 234"]            # a completion is scored as a whole


@each("call, shapes", [
    (standardize, "23 24"), (standardize, "04"), (tpo_target, "24 23"), (tpo_weights, "24 23 24"),
    (tpo_weights, "23 24 24"),
    *((method.bind(), shapes) for method in METHODS.values() for shapes in WRONG[method.per])])
def test_shapes_that_broadcasting_would_hide_are_refused_by_name(call, shapes):
    shapes = [tuple(map(int, shape)) for shape in shapes.split()]
    with pytest.raises(ValueError) as error:
        call(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@each("extreme", [-math.inf, -1e4, 1e4, -3])
@each("method", METHODS.values(), ids=METHODS)
def test_losses_survive_impossible_candidates_in_fp32(method, extreme):
    logp = torch.tensor([[extreme, -1, -2]], dtype=torch.bfloat16, requires_grad=True)
    logp_old = torch.tensor([[-1, extreme, -2]], dtype=torch.bfloat16)
    for scores in torch.tensor([[[1, 0, 0.5]], [[0.5, 0.5, 0.5]]], dtype=torch.bfloat16):
        loss, exact = (method.loss(*(x.to(dtype) for x in (logp, logp_old, scores)))
                       for dtype in (torch.bfloat16, torch.float64))
        assert loss.isfinite() and grad(loss, logp).isfinite().all()
        close(loss, exact.float())
        if method.per != "group":                             # a sum is a completion of one token
            close(loss, method.loss(logp[..., None], logp_old[..., None], scores))


# ---- bandit.py -----------------------------------------------------------------------------------

FIRST = F.one_hot(torch.tensor(0), 10).double()
CONFIDENT = torch.tensor([0.02, 0.001, 0.9, 0.005, 0.004, 0.03, 0.01, 0.02, 0.005, 0.005], **F64)


def policies(n):
    """(n, 10): a confident policy and random ones."""
    logits = 3 * torch.rand(n - 1, 1, **F64) * torch.randn(n - 1, 10, **F64)
    return torch.cat((CONFIDENT[None], logits.softmax(-1)))


def push(pi, weight):
    """sum_a weight_a (e_a - pi): an update in logit space."""
    return weight @ (torch.eye(10, **F64) - pi)


def ascent(loss, pi):
    """-dL/dlogits of loss(logp) at the logits log pi."""
    logits = pi.log().requires_grad_()
    return -grad(loss(logits.log_softmax(-1)), logits)


@each("eta", [0.5, 2.0])
@each("algo", bandit.ALGOS["multi"])
def test_bandit_multi_updates_are_expectations_over_the_actions(algo, eta):
    for pi in (*policies(5), CONFIDENT.roll(-2)):
        p = pi[0]
        A = FIRST - p
        weight = {"ce": FIRST, "pg": pi * A, "grpo": pi * A / (p * (1 - p)).sqrt(),
                  "dg": pi * FIRST / (1 + p**(1 / eta)),
                  "tpo": tpo_target(pi.log(), FIRST, eta)}[algo]
        close(bandit.beta(algo, p, eta) * (FIRST - pi), push(pi, weight))
    assert bandit.beta(algo, torch.ones((), **F64), eta).isfinite()     # p rounds to 1 in the end


@each("algo", bandit.ALGOS["single"])
def test_bandit_single_updates_are_means_over_the_sampled_actions(algo):
    pi, a = policies(1), torch.randint(10, (1, 100))
    r = (a == 0).double()
    A = standardize(r) if algo == "grpo" else r - 0.5
    if algo == "dg":
        A = A / (1 + (A * pi[0, a].log() / 2).exp())
    weight = (A[..., None] * F.one_hot(a, 10)).mean(1)
    if algo == "tpo":
        weight = tpo_target(pi.log(), weight, 2.0)
    g = bandit.single_gradient(algo, pi, a, r, 2.0)
    close(g, push(pi[0], weight), rtol=1e-6, atol=1e-9)
    for name in METHODS if algo == "grpo" else ():            # why bandit.py leaves them out
        if name not in ("tpo", "tpo_no_anchor", "dg", "ddpg", "oapl", "kondo"):
            loss = lambda logp: METHODS[name].loss(logp[0, a], logp.detach()[0, a], r)
            close(F.normalize(ascent(loss, pi)), F.normalize(g), rtol=1e-6, atol=1e-9)


def expected_update(algo, pi, y, eta, sigma):
    """mnist_loss's, over the ten actions; GRPO's, of a batch with this deviation, as printed."""
    if algo == "grpo":
        return pi[y] / sigma * (F.one_hot(y, 10) - pi)
    loss = lambda logp: bandit.mnist_loss(algo, logp, torch.arange(10)[None], y.expand(1, 10), eta)
    return 10 * pi @ ascent(loss, pi.expand(1, 10, 10))[0]


@each("eta", [1.0, 0.7])
@each("algo", bandit.ALGOS["mnist"])
def test_bandit_mnist_updates_and_surplus_are_expectations(algo, eta):
    certain = (800 * FIRST).softmax(-1)[None]                 # p_y = 1 exactly must not become NaN
    pi, y = torch.cat((policies(100), certain)), torch.arange(101) % 10
    reward = pi[range(101), y].mean()
    settings = eta, (reward * (1 - reward)).sqrt()
    updates, bins = bandit.mnist_update(algo, pi[None], y, eta)[0], [[], [], [], []]
    for p, k, g in zip(pi[:-1], y, updates):
        close(g, expected_update(algo, p, k, *settings))
        if p.argmax() != k:
            even = ((1 - p[k]) / 9).repeat(10)                # the surrogate: beta (e_y - pi)
            even[k] = p[k]
            beta = expected_update(algo, even, k, *settings)[k] / (1 - p[k])
            v, concentration = F.one_hot(k, 10) - p, p.amax() / (1 - p[k])
            bins[min(3, int(concentration * 4))].append(p[k] * (v @ g - beta * v @ v))
    means = torch.stack([torch.stack(gains).mean() for gains in bins])
    close(bandit.surplus(algo, pi[None], y, eta)[0], means, rtol=1e-5, atol=1e-9)
    assert algo != "dg" or (means < 0).all()                  # the paper: slightly negative; and
    assert algo != "tpo" or means[3] > 4 * means[0].abs()     # about 0, ..., .073
    assert bandit.surplus(algo, certain[None], y[:1], eta).isnan().all()


def test_bandit_grpo_z_scores_the_batch_of_each_seed():
    pi, y = policies(10).view(2, 5, 10), torch.arange(10).view(2, 5)
    a = y.where(y % 5 < 2, 9)                                 # right: 1 1 0 0 0 and 1 1 0 0 1
    A = standardize((a == y).double())
    g = ascent(lambda logp: bandit.mnist_loss("grpo", logp, a, y, 1.0), pi)
    close(g, A[..., None] * (F.one_hot(a, 10) - pi) / 5, rtol=1e-5, atol=1e-7)


def test_bandit_sampling_misalignment_and_initial_weights():
    pi = policies(2)
    assert torch.equal(bandit.sample(pi, pi.cumsum(-1) - pi / 2), torch.arange(10).expand(2, 10))
    assert bandit.sample(torch.full((1, 3), 1 / 3), torch.ones(1, 1)) == 2
    close(bandit.misalignment(*pi), 1 - F.cosine_similarity(*pi, 0))
    assert (bandit.misalignment(0 * pi, pi) == 1).all()
    W, *_ = bandit.network(torch.Generator(), 784)
    assert W.std().item() == pytest.approx(1 / 28, rel=0.02)


def fake_mnist(*_):
    labels = torch.randint(10, (1100,))                       # more than are evaluated at once
    images = torch.rand(1100, 784) * 0.1 + F.one_hot(labels, 784)       # learnable: pixel y
    return 2 * (images, labels)


@each("algo", bandit.ALGOS["mnist"])
def test_bandit_seeds_do_not_depend_on_their_neighbours(algo):
    for run, *more in (bandit.single,), (bandit.multi,), (bandit.mnist, fake_mnist(), False):
        if algo in bandit.ALGOS[run.__name__]:
            alone, beside = (list(run(algo, n, 20, 1.0, *more))[-1][1] for n in (2, 3))
            first = {key: values[:2] for key, values in beside.items()}
            close(alone, first, rtol=1e-4, atol=1e-4)
    assert algo == "ce" or len(beside["misalignment"].unique()) == 3


def test_bandit_reads_downloads_and_refuses_idx_files(tmp_path, capsys, monkeypatch):
    good = bytes.fromhex("00000803 00000002 00000003 00000004") + bytes(range(24))
    folder = tmp_path / "new"
    monkeypatch.setattr(bandit, "MIRROR", f"file://{tmp_path}/")
    one_line(capsys, f"--data {folder} train-images-idx3-ubyte.gz missing curl",
             bandit.main, ["--task", "mnist", "--data", str(folder)])
    (tmp_path / "a.gz").write_bytes(gzip.compress(good))      # on the mirror
    expected = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    close(bandit.read_idx(folder, "a.gz", 2, 3, 4), expected)
    wrong = good + b"x", good[:-1], b"\0\0\t" + good[3:]      # too long, too short, int8
    for content in (b"<html>", *map(gzip.compress, wrong)):
        (folder / "a.gz").write_bytes(content)
        one_line(capsys, f"{folder}/a.gz damaged curl {bandit.MIRROR}a.gz",
                 bandit.read_idx, folder, "a.gz", 2, 3, 4)


def test_bandit_ranks_the_methods_as_the_paper_does(tmp_path, capsys, monkeypatch):
    log = tmp_path / "log"
    bandit.main(f"--seeds 2 --steps 800 --out {log}".split())
    kinds = ["config"] + ["eval"] * (4 * 800 + 5 * 161) + ["result"] * 9
    assert [r["kind"] for r in logged(log)] == kinds
    out = capsys.readouterr().out
    assert out.startswith("not among these: MNIST") and out.isascii()
    assert re.search(r"\npg .* 125 +0.056 .*\ngrpo +0.00017 \+- 1.2e-05 +101 +0.59 .*\ndg .* 96 +"
                     r"0.00095 .*\ntpo .* 95 ", out)
    assert out.endswith("multi: mean error below 1%: ce at step 685, tpo at step 708, grpo at step "
                        "786, pg never, dg never\n")
    monkeypatch.setattr(bandit, "run", lambda *_: [{"another": log.write_bytes(b"run's")}])
    one_line(capsys, f"--out {log} another", bandit.main, ["--out", str(log)])
    assert os.listdir(tmp_path) == ["log"] and log.read_bytes() == b"run's"
    one_line(capsys, "cannot write", bandit.write, "no/such/log", b"")


def test_bandit_mnist_learns(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 900, 10))                           # 10 s from one look to the next
    monkeypatch.setattr(bandit, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(bandit, "load_mnist", fake_mnist)
    bandit.main(f"--task mnist --algo tpo --seeds 2 --steps 400 --mechanism "
                f"--out {tmp_path}/log".split())
    config, first, last, mechanism, result = logged(tmp_path / "log")
    assert last["error"] == result["final_error"] < 0.1 and result["seconds"] == 40
    assert "  40 seed-steps/s     10 s left for tpo\n" in capsys.readouterr().out


def test_bandit_reports_means_and_the_first_step_below_each_bar(monkeypatch):
    errors = {200: 0.06, 400: 0.049, 600: 0.051, 800: 0.012, 1000: 0.0099, 1200: 0.02}
    metrics = [{"error": torch.tensor([e, e + 2e-5], **F64), "misalignment": torch.tensor([0.2])}
               for e in errors.values()]
    monkeypatch.setattr(bandit, "mnist", lambda *_: zip(errors, metrics))
    least, _ = bandit.parse("--seeds 1 --steps 1 --eta 0.01".split())       # that is allowed
    result = bandit.run("mnist", "tpo", least, None)[-1]
    expected = dict(final_error=0.02001, final_error_se=1e-5, final_misalignment=0.2,
                    steps_to_5pct=400, steps_to_1pct=1000)
    assert result.items() >= expected.items()


# ---- seqtask.py ----------------------------------------------------------------------------------

RUN = seqtask.Run("reverse_copy", "terminal", "tpo", 4, 2, 4, 12, 4, 1.0, 1e-3, "prompts", 2, 6)
CASES = [*itertools.product(METHODS, ["terminal"]), ("tpo", "sequential"), ("dg", "bag"),
         *itertools.product(seqtask.TOKEN, ("bag", "sequential"))]


def plain_forward(P, s, tokens):
    """Log-probs (N, L, V) by one seed's model the ordinary way: no sharing, no folding."""
    p = {name: x[s].squeeze(0) for name, x in P.items()}
    norm = lambda x, at: F.layer_norm(x, (64,), p["gain" + at], p["shift" + at], 1e-6)
    linear = lambda x, name, at: x @ p[name + at] + p[f"{name}_bias{at}"].flatten()
    x = p["token"][tokens] + p["position"][:tokens.shape[1]]
    for l in (".0", ".1"):
        qkv = linear(norm(x, "1" + l), "qkv", l).unflatten(-1, (3, 2, 32))
        q, k, v = qkv.transpose(1, 3).unbind(2)               # (N, heads, L, 32)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(attended.transpose(1, 2).flatten(2), "out", l)
        hidden = F.gelu(linear(norm(x, "2" + l), "up", l), approximate="tanh")
        x = x + linear(hidden, "down", l)
    return linear(norm(x, ""), "head", "").log_softmax(-1)


def test_seqtask_task_draws_and_tree_by_hand():
    bits = lambda text: [[int(bit) for bit in word] for word in text.split()]
    right = torch.tensor(bits("1101 1111 0111"))
    for kind, expected in table("bag | 1101 1111 0111; sequential | 1100 1111 0000;"
                                "terminal | 0000 1111 0000"):
        assert seqtask.rewards(kind, right).tolist() == bits(expected)
    for target, expected in table("copy | 013; flip | 320; reverse_copy | 310; reverse_flip | 023"):
        assert seqtask.goal(target, torch.tensor([[0, 1, 3]]), 4).tolist() == bits(expected)
    prompts, y, choice = (torch.tensor([[bits(text)]]) for text in ("012", "200", "21 01 02"))
    for algo, reward, expected in table("tpo_token | bag | 10 01 10; dg | sequential | 100;"
                                        "tpo_token | sequential | 10 01 00"):
        run = RUN._replace(algo=algo, reward=reward, vocab=3)
        _, scores = seqtask.score(run, prompts[0], y[0], choice)
        assert scores[0, 0].tolist() == bits(expected)
    tree = seqtask.tree(torch.tensor([bits("010 010 011")]), 2, 2, 1)
    assert tree.node.tolist() == [bits("320 320 321")]
    uniform = torch.tensor([0.1, 0.5, 1.0])
    assert seqtask.inverse_cdf(torch.tensor([0.2, 0.7]).log(), uniform).tolist() == [0, 1, 1]


@each("seeds", [[1], [1, 2]])
@each("algo, reward", CASES)
def test_seqtask_shared_and_skipped_rows_keep_the_gradient(algo, reward, seeds):
    """On the first epoch and, as each step moves the policy, on the second."""
    run = RUN._replace(algo=algo, reward=reward, length=3, vocab=3, epochs=2, eta=0.8,
                       diagnostics=True)
    part, S, per, seen = seqtask.Seeds(run, seeds, "cpu"), len(seeds), seqtask.ALGOS[algo].per, []
    P, n = part.P, 1 if per == "sample" else 4
    loss = METHODS[algo.removesuffix("_token")].bind(eta=0.8, anchor=1.0, length=3)
    P["head"].data *= 2                                       # less uniform, as after some training
    P["qkv_bias.0"].data += torch.randn_like(P["qkv_bias.0"])
    prompts, uniform = torch.randint(3, (S, 128, 3)), torch.rand(S, 128, n, 3)
    y, choice, logp_old = seqtask.sample(run, P, prompts, uniform)
    _, scores = seqtask.score(run, prompts, y, choice)
    sequences = torch.cat((prompts.repeat_interleave(run.rollouts, 1), y[..., :-1]), -1)
    plain = lambda: torch.stack([plain_forward(P, s, sequences[s])[:, 2:] for s in range(S)])
    folded = lambda x: x if per == "next" else x.view(S, 128, n, 3)
    draws = seqtask.inverse_cdf(plain().unflatten(1, (128, -1)), uniform)
    assert torch.equal(folded(choice), draws.mT if per == "next" else draws)
    close(logp_old, plain().detach().gather(-1, choice), atol=2e-5, rtol=1e-4)

    def step():
        l, l_old = folded(plain().gather(-1, choice)), folded(logp_old)
        if per == "group":
            l, l_old = l.sum(-1), l_old.sum(-1)
        gradient = [p.grad for p in P.values()]
        same_gradients(sum(map(loss, l, l_old, scores)), P.values(), gradient)
        seen.append(torch.cat([g.flatten(1) for g in gradient], 1).norm(dim=1))
        for p in P.values():
            p.data += 0.05 * torch.randn_like(p)

    optimizer = [SimpleNamespace(step=step)]
    notes = seqtask.episode(run, P, optimizer, prompts, uniform, part.started)
    close(notes["gradient_norm"], seen[0], atol=0, rtol=1e-3)
    assert len(seen) == 2


def test_seqtask_seeds_do_not_depend_on_their_neighbours():
    run = RUN._replace(algo="dg", reward="sequential", seeds=3, episodes=3, lr=0.02)
    alone, together = (seqtask.train(run, "cpu", share)[0] for share in (True, False))
    close(together, alone)
    assert not torch.equal(*alone[:, 1:].T)


def test_seqtask_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Each episode of two seeds takes 40 s: a checkpoint is due after every second one."""
    flags = "--algo grpo,tpo --length 4 --batch 10 --seeds 2 --episodes 6 --diagnostics --out "
    call = lambda path: seqtask.main((flags + str(path)).split())
    log, whole, last = (tmp_path / name for name in ("log", "whole", "log.checkpoint"))
    (tmp_path / "log.part").touch()                           # somebody else's
    episode, calls, dies = seqtask.episode, [], None

    def counted(*arguments):
        if len(calls) == dies:
            raise KeyboardInterrupt
        calls.append(1)
        return episode(*arguments)

    monkeypatch.setattr(seqtask, "episode", counted)
    monkeypatch.setattr(seqtask, "time", SimpleNamespace(monotonic=lambda: 20 * len(calls)))
    call(whole)
    assert " 160 s left" in capsys.readouterr().out
    dies = 24 + 12 + 11                                       # in the sixth episode of tpo
    pytest.raises(KeyboardInterrupt, call, log)
    saved, dies = last.read_bytes(), None
    seqtask.train(RUN._replace(diagnostics=True), "cpu", True, [last])
    assert "of another run" in capsys.readouterr().out
    for i in (0, 40, -1):
        damaged = bytearray(saved)
        damaged[i] ^= 1
        last.write_bytes(damaged)
        one_line(capsys, f"{last} checksum delete", call, log)
    last.unlink()
    call(log)
    out = capsys.readouterr().out
    assert "not run again" in out and f"after episode 2, from {last}.previous" in out
    assert logged(log)[1:] == logged(whole)[1:]
    assert logged(log)[-1]["ms_per_episode_seed"] == 20_000
    assert {*os.listdir(tmp_path)} == {*"log log.lock log.part whole whole.lock".split()}


def test_seqtask_out_is_of_one_run_and_never_half_written(tmp_path, monkeypatch, capsys):
    call = lambda path, words: one_line(capsys, words, seqtask.main, ["--out", str(path)])
    log, fifo = tmp_path / "log", tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "no" / "log"):
        call(path, f"--out {path}: allowed folder")
    assert fifo.is_fifo()
    for text in ('{"kind": "result", "task": "single"}\n', "[1]\n", '{"half'):
        log.write_text(text, encoding="utf-8")
        call(log, "log: no log of seqtask.py")
    with seqtask.alone(log):
        call(log, f"{log}: process {os.getpid()} is writing")
    monkeypatch.setattr(os, "fsync", lambda file: open(tmp_path))             # an OSError
    one_line(capsys, "cannot write log intact", seqtask.write, b"new", log)
    assert log.read_text(encoding="utf-8") == text and len(os.listdir(tmp_path)) == 3


def test_seqtask_what_goes_to_muon_initial_scales_and_interactions(monkeypatch):
    run = RUN._replace(algo="dg", vocab=16, length=10, candidates=9, match="interactions")
    part = seqtask.Seeds(run, [0], "cpu")
    P, (muon, adam) = part.P, part.optimizer
    on_muon = {id(p) for group in muon.groups.values() for p in group}
    names = {name.rstrip(".01") for name in P if id(P[name]) in on_muon}
    assert names == {*"token position qkv_bias up down head".split()}
    rest, = adam.param_groups
    assert len(on_muon) + len(rest["params"]) == len(P) and rest["weight_decay"] == 0
    assert muon.lr == rest["lr"] == 3e-3 and rest["fused"] and len(muon.groups) == 4
    for name, std in table("token | 0.125; position | 0.02; qkv.0 | 0.125; out.1 | 0.125;"
                           "up.0 | 0.125; down.0 | 0.0625; head | 0.125"):
        assert P[name].std().item() == pytest.approx(float(std), rel=0.08), name
    monkeypatch.setattr(seqtask, "episode", lambda *inputs: [x.shape for x in inputs[3:5]])
    assert part.episode(run) == [(1, 108, 10), (1, 108, 1, 10)]


@each("seeds", [1, 2])
def test_seqtask_a_seed_that_never_had_a_gradient_stays_where_it_is(seeds):
    """All answers wrong: rounding must not become Muon's full-size steps, whoever is beside it."""
    run = RUN._replace(length=12)
    part = seqtask.Seeds(run, range(seeds), "cpu")
    part.started[:-1] = True
    weights = lambda: torch.cat([p[-1].flatten() for p in part.P.values()])
    before = weights()
    assert part.episode(run)["error"].eq(1).all() and not part.started[-1]
    assert torch.equal(weights(), before)


def test_seqtask_dense_run_reaches_one_percent(tmp_path):
    seqtask.main(f"--reward bag --algo tpo_token --length 3 --batch 30 --episodes 45 --seeds 1 "
                 f"--out {tmp_path}/log".split())
    _, curve, result = logged(tmp_path / "log")
    assert result["steps_to_1pct"] < 40 and curve["error"][0] > 0.3


def test_seqtask_result_by_hand():
    run, errors = RUN._replace(seeds=4, episodes=400), torch.ones(400, 4)
    errors[200] = 0.012
    errors[390:] = torch.tensor([0.04, 0.06, 0.02, 0.04])
    curve, result = seqtask.records(run, errors, {"note": errors}, 8.0)
    names = "final_error final_error_se solved steps_to_1pct ms_per_episode_seed".split()
    assert [result[name] for name in names] == [0.04, 0.008165, 0.75, None, 5]
    assert len(curve["error"]) == 200 and curve["error"] == curve["note"]
    assert curve["error_se"][0] == 0 and curve["error_per_seed"][1][100] == 0.506
    errors[300] = 0.009
    assert seqtask.records(run, errors, {}, 8.0)[1]["steps_to_1pct"] == 300


def test_seqtask_last_line_names_what_varies(capsys):
    results = {}
    for i, (algo, eta) in enumerate(itertools.product(("dg", "tpo"), (1.0, 0.5)), 1):
        run = RUN._replace(algo=algo, length=4 - i % 2, eta=eta, seeds=1)
        results[run] = seqtask.records(run, torch.full((10, 1), i / 100), {}, 1.0)[1]
    seqtask.report(dict(reversed(results.items())))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("final error, 1 seed: dg H 3 eta 1 1.0%, dg H 4 eta 0.5 2.0%, "
                    "tpo H 3 eta 1 3.0%, tpo H 4 eta 0.5 4.0%")


def test_seqtask_diagnostics_by_hand():
    scores = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]])   # u: sqrt 3, -1 / sqrt 3 and 0
    for algo, *weight in (("tpo", 0.77044, 0.17565), ("grpo", 1.73205, 0.24744)):
        notes = seqtask.diagnostics(RUN._replace(algo=algo), torch.tensor([2.0]),
                                    torch.zeros(1, 8, 3, 1), scores)
        close(torch.cat([*notes.values()]), torch.tensor([2, 0.5, 0.5, *weight]), atol=1e-5, rtol=0)
    none = seqtask.diagnostics(RUN, torch.zeros(1), torch.zeros(1, 8, 3, 1), torch.zeros(1, 2, 4))
    notes = {"weight": torch.tensor([[math.nan, 2], [math.nan, math.nan]])}     # (episodes, seeds)
    curve, _ = seqtask.records(RUN, torch.zeros(2, 2), notes, 1)
    assert none["weight_success"].isnan() and curve["weight"] == [2, None]


@each("preset, count", table("""
table1 | 16; table2 | 32; table3 | 28; fig8 | 4; eta | 5; ksweep | 10; epochs | 10; masking | 3
dg-epochs | 2; section4 | 2
"""))
def test_seqtask_presets(preset, count):
    runs, small, three = (seqtask.parse(["--preset", preset, *flags.split()])[1]
                          for flags in ("", "--smoke", "--seeds 3"))
    assert len(runs) == int(count) and three[0].seeds == 3
    assert all(run.epochs == 1 for run in runs if run.algo == "dg") or preset == "dg-epochs"
    assert all(run.episodes <= 300 and run.length <= 6 for run in small)
    assert len(seqtask.parse("--algo tpo,tpo,dg --match prompts,interactions".split())[1]) == 3


def test_seqtask_weights_that_are_not_finite_stop_the_run(monkeypatch, capsys):
    monkeypatch.setattr(seqtask, "episode", lambda run, P, *rest: {
        "error": P["head"].data.fill_(math.nan).flatten()[:1]})
    one_line(capsys, "not finite episode 6 --lr", seqtask.train, RUN, "cpu", True)


# ---- llm_rlvr.py ---------------------------------------------------------------------------------

TINY = ("--device cpu --width 32 --layers 1 --prompts 6 --candidates 4 --warm-steps 4 --steps 5 "
        "--eval-every 2 --eval-puzzles 8").split()
TIMES = {"seconds", "sample_tok_s", "train_tok_s", "peak_mb", "out", "resume"}
RUN_0 = "graph_color-tpo-0"


def parse(flags=""):
    return llm_rlvr.parse(flags.split(), llm_rlvr.Trainer)


def tiny(flags=""):
    return llm_rlvr.Trainer(*parse(" ".join(TINY) + " " + flags))


def train(folder, flags=""):
    """The log of a run of graph_color by tpo, seed 0."""
    llm_rlvr.main([*TINY, "--out", str(folder), *flags.split()])
    return logged(folder / RUN_0 / "log.jsonl")


def untimed(log):
    return [{key: r[key] for key in r.keys() - TIMES} for r in log]


def training_puzzles(t, n):
    return llm_rlvr.puzzles(t.task, random.Random(1), n, "train")


def spy(owner, name):
    """A list that gets (arguments, result) of each call to this method from now on."""
    calls, real = [], getattr(owner, name)

    def call(*arguments, **settings):
        calls.append((arguments, real(*arguments, **settings)))
        return calls[-1][1]

    setattr(owner, name, call)
    return calls


def plain_logp(model, prompt, completion):
    """Token log-probs of a completion by a causal forward of its own: nothing shared or cached."""
    def attend(_, *qkv):
        q, k, v = (x.transpose(0, 1) for x in qkv)                                  # (heads, S, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(0, 1)

    ids = torch.tensor(prompt + completion)
    logp = model.lm_head(model(ids, torch.arange(len(ids)), attend)).log_softmax(-1)
    return logp[range(len(prompt) - 1, len(ids) - 1), completion]


def same_gradients(loss, parameters, expected):
    """Up to rounding, which is relative to the largest entry."""
    scale = max(g.abs().max().item() for g in expected)
    close(torch.autograd.grad(loss, parameters), expected, atol=2e-5 * scale, rtol=1e-3)


@each("T", [1, 40])
@each("family", ["Qwen3", "Qwen2"])
def test_sampler_and_shared_prompts_give_the_plain_log_probs_and_gradients(family, T):
    c = llm_rlvr.ModelConfig(20, 32, 2, 4, 2, 8, 48, qkv_bias=family == "Qwen2")
    model = llm_rlvr.GPT(c)
    if family == "Qwen2":
        for block in model.model.layers:
            block.self_attn.q_norm = block.self_attn.k_norm = torch.nn.Identity()
        model.model.embed_tokens.weight = model.lm_head.weight
    parameters = tuple(model.parameters())
    for p in parameters:
        p.data += 0.1 * torch.randn_like(p)                   # norms are 1, biases 0 at first
    tokens = torch.randint(18, (3, 5)).where(torch.ones(3, 5).tril(2).flip(1) > 0, -1)
    prompts = [x[x >= 0].tolist() for x in tokens for _ in range(4)]
    ends, generator = torch.tensor([19, 18]), torch.Generator().manual_seed(2)
    calls = spy(model.model.layers[0], "forward")
    y, logp = llm_rlvr.sample(model, tokens, 4, T, ends, generator)
    sizes = [len(inputs[0]) for inputs, _ in calls]
    assert sizes[:2] == [3, 12][:T] and (T == 1 or 12 > sizes[-1])  # rows that ended have left

    y, logp = y.flatten(0, 1), logp.flatten(0, 1)
    real = torch.tensor([[max(row[:t], default=0) < 18 for t in range(T)] for row in y.tolist()])
    assert torch.equal(y >= 0, real) and real[:, min(T - 1, 16)].any()
    plain = [F.pad(plain_logp(model, x, row[row >= 0].tolist()), (0, int((row < 0).sum())))
             for x, row in zip(prompts, y)]
    plain = torch.stack(plain)
    close(logp, plain, atol=1e-5, rtol=1e-5)

    order, weights = torch.randperm(12), torch.randn(12, T)
    gradient = torch.autograd.grad((plain * weights).sum(), parameters)
    for model.recompute, vocab in (False, 20), (True, 20), (False, 2**22):       # 4 tokens a chunk
        model.config = replace(model.config, vocab=vocab)
        logp = llm_rlvr.token_logp(model, tokens, y[order], order // 4)
        close(logp, plain[order], atol=1e-5, rtol=1e-5)
        same_gradients((logp * weights[order]).sum(), parameters, gradient)


def test_samples_have_the_policys_frequencies_and_greedy_is_its_mode():
    model = llm_rlvr.GPT(llm_rlvr.ModelConfig(8, 32, 1, 4, 2, 8, 48))
    prompt, never, generator = torch.tensor([[1, 2]]), torch.tensor([9]), torch.Generator()
    y, _ = llm_rlvr.sample(model, prompt, 20_000, 2, never, generator)
    pairs = itertools.product(range(8), repeat=2)
    p = torch.stack([plain_logp(model, [1, 2], [*pair]).sum() for pair in pairs]).exp()
    frequency = (y[0] @ torch.tensor([8, 1])).bincount(minlength=64) / 20_000
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    greedy, _ = llm_rlvr.sample(model, prompt, 1, 1, never, None)
    assert greedy == p.view(8, 8).sum(1).argmax()


def test_initial_weights_keep_the_size_of_activations():
    model = llm_rlvr.GPT(llm_rlvr.ModelConfig(500, 64, 3, 4, 2, 16, 96))
    for name, p in model.named_parameters():
        fan_in = p.shape[-1] * (6 if "o_proj" in name or "down_proj" in name else 1)
        if p.ndim == 2:
            std = 1 if "embed" in name else fan_in ** -0.5
            assert p.std().item() == pytest.approx(std, rel=0.06)
    close(model.inv_freq[::2], torch.tensor([1, 0.1, 0.01, 0.001]))


def test_muon_is_for_the_matrices_of_blocks_and_adamw_without_decay_for_the_rest():
    t = tiny()
    (muon, _), (adam, _) = t.optimizers
    names = {p: name for name, p in t.model.named_parameters()}
    moved = [{names[p] for p in o.param_groups[0]["params"]} for o in (muon, adam)]
    assert moved[0] == {name for name in names.values() if "_proj." in name}
    assert moved[1] == {*names.values()} - moved[0] and adam.defaults["weight_decay"] == 0


@each("script, lead", [(seqtask, [2]), (llm_rlvr, [])])
def test_muon_is_nesterov_momentum_with_singular_values_moved_near_one(script, lead):
    """Of (in, out) matrices of two seeds in seqtask.py, of (out, in) ones in llm_rlvr.py."""
    shapes = (64, 256), (256, 64), (2, 64), (3, 3)
    params = [torch.randn(*lead, *shape, requires_grad=True) for shape in shapes]
    expected, momentum = [p.detach().double() for p in params], [0] * 4
    muon = seqtask.Muon(params, 0.01) if lead else llm_rlvr.Muon(params, {"lr": 0.01})
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.95 * momentum[i] + p.grad.double()
            U, s, V = torch.linalg.svd(0.95 * momentum[i] + p.grad.double(), full_matrices=False)
            s = s / s.norm(dim=-1, keepdim=True)
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            n_in, n_out = shapes[i] if lead else shapes[i][::-1]
            expected[i] -= 0.01 * max(1, n_out / n_in)**0.5 * U @ (s[..., None] * V)
        muon.step()
    close([p.detach().double() for p in params], expected, atol=1e-5, rtol=1e-4)


@each("algo, flags", [*((algo, "") for algo in METHODS),
                      *((algo, "--recompute --micro-tokens 30") for algo in METHODS)])
def test_both_epochs_have_the_exact_gradient_and_equal_completions_are_computed_once(algo, flags):
    """The gradient of an update against autograd of all B * K completions, each by a forward."""
    t = tiny(f"--algo {algo} --task addition --prompts 4 --candidates 8 --epochs 2 --warm-steps 30"
             f" --eta 0.7 --anchor 0.5 --clip 0.1 --beta 0.3 {flags}")
    given = dict(eta=0.7, anchor=0.5, clip=0.1, beta=0.3, length=4)
    assert t.loss.keywords.items() >= {name: given[name] for name in METHODS[algo].takes}.items()
    t.warm_start()
    scores = torch.tensor([[1] + [0] * 7, [1] * 6 + [0] * 2, [0] * 8, [1] * 8]).float()
    rollouts, samples, calls = (spy(t, name) for name in ("rollout", "sample", "token_logp"))
    t.score, method, plain = lambda *_: scores, METHODS[algo], []

    def checked_step(step=t.optimizer_step):
        ((items,), rollout), (_, (y, _)) = rollouts[0], samples[0]
        mask, groups = y >= 0, y.tolist()                                               # (4, 8, T)
        logp = torch.stack([plain_logp(t.model, t.vocabulary.encode(text), ids)
                            for (text, _), group in zip(items, groups) for ids in group])
        logp = logp.view(4, 8, -1) * mask
        plain.append(logp.detach())
        inputs = logp, plain[0]
        if method.per == "group":
            inputs, mask = [x.sum(-1) for x in inputs], None
        gradient = [p.grad for p in t.trained]
        same_gradients(t.loss(*inputs, scores, mask=mask), t.trained, gradient)

        distinct = [len(set(map(tuple, group))) for group in groups]
        assert len(rollout.y) == sum(distinct) < 32
        if len(plain) == 1:                                   # groups at rest are not computed
            rows = 1 if algo == "kondo" else sum(distinct[:2 if method.rests else 4])
            assert sum(len(y) for (_, _, y, _), _ in calls) == rows
            assert (len(calls) > 1) == (rows > 1 and flags != "")
        assert max(x.numel() + y.numel() for (_, x, y, _), _ in calls) <= t.c.micro_tokens
        return step()

    t.optimizer_step = checked_step
    t.update()
    assert len(plain) == 2 and not torch.equal(*plain)
    forwards, before = spy(t.model.model.layers[0].input_layernorm, "forward"), len(calls)
    t.backward(rollouts[0][1], torch.ones_like(rollouts[0][1].logp_old))
    assert len(forwards) == (len(calls) - before) * (2 if "--recompute" in flags else 1)


@each("algo, anchor", [*((algo, 0.25) for algo in METHODS), ("tpo", 0), ("tpo", 1)])
def test_equal_scores_change_no_weight(algo, anchor):
    t, weights, norms = tiny(f"--algo {algo} --epochs 2 --anchor {anchor}"), [], []
    t.score = lambda *_: scores
    for scores in torch.eye(6, 4), torch.full((6, 4), 0.1 if METHODS[algo].rests else 1.0):
        norms.append(t.update()["grad_norm"])                 # the first fills AdamW's moments
        weights.append(torch.nn.utils.parameters_to_vector(t.trained).detach())
    rests = torch.equal(*weights)
    assert norms[0] > 0 and rests == (norms[1] == 0) == (algo != "tpo_no_anchor")


def test_updates_follow_the_schedule_on_training_puzzles_and_report_speed(monkeypatch):
    t = tiny("--steps 90 --lr 0.3 --epochs 3")
    t.score, drawn = (lambda *_: torch.eye(6, 4)), spy(t, "rollout")
    clock = SimpleNamespace(perf_counter=itertools.count(step=4).__next__)
    monkeypatch.setattr(llm_rlvr, "time", clock)
    for t.step, rate in (0, 1 / 30), (14, 0.5 * 76 / 90), (29, 61 / 90), (60, 1 / 3), (89, 1 / 90):
        m = t.update()
        rates = [optimizer.param_groups[0]["lr"] for optimizer, _ in t.optimizers]
        assert rates == pytest.approx([0.3 * rate, 0.06 * rate])
        speeds = [round(m["tokens"] * 24 * epochs / 4) for epochs in (1, 3)]
        assert [m["sample_tok_s"], m["train_tok_s"]] == speeds
    splits = [llm_rlvr.hash_split(text) for (items,), _ in drawn for text, _ in items]
    assert splits == ["train"] * 30


def test_a_seed_decides_weights_warm_start_puzzles_and_samples():
    def drawn(seed):
        t = tiny(f"--seed {seed} --warm-steps 1")
        weights, prompts = t.model.lm_head.weight.tolist(), spy(t, "encode_prompts")
        t.warm_start()
        ((warm,), _), = prompts
        assert {llm_rlvr.hash_split(text) for text, _ in warm} == {"train"}
        return weights, warm, t.rng.random(), t.generator.get_state().tolist()

    one, two, again = map(drawn, (1, 2, 1))
    assert one == again and all(x != y for x, y in zip(one, two))


def test_update_scores_its_samples_and_its_metrics_and_slope_are_those_by_hand():
    t, scores, seen = tiny("--anchor 0.5"), torch.eye(6, 4), []         # two of six groups rest
    samples, rollouts = spy(t, "sample"), spy(t, "rollout")
    t.score = lambda items, y: seen.append(y) or scores
    metrics, (y, logp), rollout = t.update(), samples[0][1], rollouts[0][1]
    assert torch.equal(seen[0], y[..., :seen[0].shape[-1]])
    length, l = (y >= 0).sum(-1), logp.sum(-1)
    q, p = tpo_target(l, scores, 1.0, 0.5), l.exp().sqrt()
    p = p / p.sum(-1, keepdim=True)
    expected = dict(
        reward=1 / 6, informative=2 / 3, anchor_dead=1 / 3, tokens=length.sum() / 24,
        unfinished=mean(t.ends[0] not in ids for ids in y.flatten(0, 1)),
        entropy=-l.sum() / length.sum(), kl=(q * (q / p).log()).sum() / 6,
        anchor_max=p.max(-1)[0].mean(), anchor_shift=(q - p).abs().sum() / 6,
        anchor_size=(p @ p.T).diagonal().pow(-1).mean(),
        drift=((q - p) * length).sum() / 6)
    assert metrics.keys() - expected.keys() == {"grad_norm", "sample_tok_s", "train_tok_s"}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=2e-5)
    slope = t.slope(rollout.logp_old, rollout, scores, q, 0)  # the same at each token
    expected = torch.zeros(len(slope)).index_add(0, rollout.row.flatten(), (p - q).flatten() / 6)
    close(slope, expected[:, None].expand_as(slope))


def test_pass1_is_four_samples_at_temperature_1_and_every_evaluation_draws_the_same():
    t = tiny("--task knights_knaves --eval-puzzles 20 --warm-steps 60")
    t.warm_start()
    state, calls, items = t.generator.get_state(), spy(t, "sample"), t.eval_items
    result = t.evaluate()
    assert [(len(x), K) for (x, K), _ in calls] == [
        (n, K) for n in (6, 6, 6, 2) for K in (1, 4)]                           # B K / 4 at once
    greedy, four = (torch.cat([y for _, (y, _) in calls[i::2]]) for i in range(2))
    for ((prompts, _), (y, _)), rows in zip(calls[::2], greedy.split(6)):
        again, _ = llm_rlvr.sample(t.model, prompts, 1, 7, t.ends, None)
        assert torch.equal(y, again) and torch.equal(y, rows)
    for name, y in ("pass1", four), ("greedy", greedy):
        scores = t.score(items, y)                            # with partial credit
        assert scores.mean() != result[name] == pytest.approx((scores == 1).float().mean().item())
    assert result["pass1"] < result["pass4"] == (t.score(items, four) == 1).any(-1).float().mean()
    two, (text, key) = [t.read(ids)[0] for ids in four[0, :2].tolist()], items[0]
    assert result["example"] == dict(prompt=text, completions=two, scores=pytest.approx(
        [t.task.check(key, answer) for answer in two]))
    assert t.evaluate() == result and torch.equal(t.generator.get_state(), state)


# ---- llm_rlvr.py: tasks, splits, flags -----------------------------------------------------------

@each("name, says", [("graph_color", r"\w-\w"), ("addition", r"\d+"),
                     ("knights_knaves", r"\w says [^.]+")])
def test_no_evaluation_puzzle_is_in_another_split_in_another_order(name, says):
    task, t = llm_rlvr.TASKS[name], tiny(f"--task {name} --seed 1 --eval-puzzles 256")
    draws = [llm_rlvr.eval_items(task, split, 256) for split in ("heldout", "test")]
    assert t.eval_items == draws[0]                           # whatever the seed
    draws.append(training_puzzles(t, 1500))
    a, b, train = ({tuple(sorted(re.findall(says, text))) for text, _ in items} for items in draws)
    assert len(a) == len(b) == 256 and len(train) > 700 and not (a & b or a & train or b & train)


def test_split_shares_and_what_happens_when_a_split_is_small(capsys):
    splits = [llm_rlvr.hash_split(f"{i}+{i}=") for i in range(10_000)]
    for split in "heldout", "test":
        assert splits.count(split) == pytest.approx(1000, abs=90)
    assert [llm_rlvr.hash_split(text) for text in "063"] == ["train", "heldout", "test"]
    numbers = SimpleNamespace(prompt=lambda rng: (str(rng.randrange(300)), None))
    n = sum(llm_rlvr.hash_split(str(i)) == "test" for i in range(300))
    for wanted, said in (n, ""), (n + 1, f"--eval-puzzles {n + 1}: the split test has {n}, all"):
        assert len(dict(llm_rlvr.eval_items(numbers, "test", wanted))) == n
        assert capsys.readouterr().out[:len(said) or 1] == said
    numbers.split = lambda text: "train"
    one_line(capsys, "--task: 0 5000 test few", llm_rlvr.puzzles, numbers, random, 5, "test")
    one_line(capsys, "--task: '?' '1?' 2,000", tiny("--task addition").vocabulary.encode, "1?")
    one_line(capsys, "--task addition empty", tiny("--task addition").encode_prompts, [("", "")])


@each("name, key, scores", [
    ("knights_knaves", dict(A="knight", B="knave", C="knight"), {
        " A knight B knave C knight": 1, " C knight A knight B knave": 1, " A knight B knave": 0,
        " A knave B knave C knight": 2 / 3, " A knight A knight B knave C knight": 0,
        " A knight B knave C knight C": 0}),
    ("graph_color", ["A-B", "C-F"], {
        " red blue red red red green": 1, " red blue red red red red": 0, " red blue red red": 0,
        " red blue red red red green red": 0, " red blue red red red pink": 0}),
    ("addition", "42", {"42": 1, "421": 0, "24": 0, "": 0})])
def test_answers_and_their_scores(name, key, scores):
    assert {answer: llm_rlvr.TASKS[name].check(key, answer) for answer in scores} == scores


@each("name", llm_rlvr.TASKS)
def test_guesses_have_the_form_and_only_finished_answers_score(name):
    t, rng, scores = tiny(f"--task {name}"), random.Random(0), []
    end, encode = t.vocabulary.ends[0], t.vocabulary.encode
    for text, key in training_puzzles(t, 300):
        guess = t.task.guess(rng, key)
        ids, score = encode(guess), t.task.check(key, guess)
        scores.append(score)
        assert t.vocabulary.decode(encode(text) + ids) == text + guess
        assert len(ids) < t.c.max_new_tokens                  # room for the end token
        y = torch.tensor([[[*ids, end, -1], [*ids, 0, 0], [end, *[-1] * len(ids), -1]]])
        close(t.score([(text, key)], y), torch.tensor([[score, 0, 0]]))
    assert 0 < sum(scores) < 225 and scores.count(1) < 75


def test_puzzles_have_the_solutions_that_they_should():
    """Knights and knaves solved again from the text alone; graphs by trying all colorings."""
    knights, graphs, sums = (training_puzzles(tiny(f"--task {name}"), 300)
                             for name in ("knights_knaves", "graph_color", "addition"))
    for text, key in knights:
        worlds = [dict(zip("ABC", w)) for w in itertools.product(("knight", "knave"), repeat=3)]
        for speaker, claim in re.findall(r"(\w) says ([^.]+)", text):
            about = re.findall(r"(\w) is", claim)
            assert about == sorted(set(about)) and len(about) < 3       # the only spelling
            claim = re.sub(r"(\w) is a (\w+)", r"(w['\1'] == '\2')", claim)
            worlds = [w for w in worlds if eval(claim) == (w[speaker] == "knight")]
        assert worlds == [key]
    for text, edges in graphs:
        assert text == f"Color {' '.join(edges)}:" and all(e[0] < e[2] for e in edges)
        colorings = (dict(zip("ABCDEF", w)) for w in itertools.product("rgb", repeat=6))
        assert any(all(w[e[0]] != w[e[2]] for e in edges) for w in colorings)
    assert {len(edges) for _, edges in graphs} == {4, 5, 6, 7, 8}
    assert all(str(eval(text[:-1])) == key for text, key in sums)


def test_tuned_settings_are_the_best_that_were_recorded():
    study = run_path(str(ROOT / "results" / "llm" / "compare.py"))
    for entry in study["ENTRIES"]:
        if entry.keys() == {"algo"}:
            [setting], [c] = study["best"](entry), parse("--algo " + entry["algo"])
            assert {name: getattr(c, name) for name in setting} == setting


def test_settings_are_defaults_then_tuned_ones_then_the_tasks_then_flags(monkeypatch, capsys):
    for c in parse("--algo " + ",".join(METHODS)):
        assert c == llm_rlvr.Config(algo=c.algo, **llm_rlvr.TUNED.get(c.algo, {}))
    for c in parse("--algo tpo,ppo,pg,rloo --lr 0.5 --epochs 2 --task addition --recompute"):
        assert (c.lr, c.epochs, c.max_new_tokens, c.recompute) == (0.5, 2, 4, True)
    assert parse("--task addition --max-new-tokens 7")[0].max_new_tokens == 7
    monkeypatch.setitem(llm_rlvr.TASKS, "mine", SimpleNamespace(defaults=dict(lr=0.7)))
    assert [(c.lr, c.epochs) for c in parse("--algo dg --task mine")] == [(0.7, 1)]
    for extreme in ("--algo pg --candidates 1", "--eta 1e-6", "--eta 1e6", "--anchor 0", "--seed 0",
                    f"--seed {2**63 - 1}", "--warm-steps 0", "--width 8 --kv-heads 4"):
        assert parse(extreme)
    parse("--algo tpo,dapo --clip 0.1 --eta 2")
    assert re.findall("of (.*) takes no (.*)", capsys.readouterr().out) == [
        ("tpo", "--clip"), ("dapo", "--clip, --eta")]


# ---- llm_rlvr.py: runs, files, errors ------------------------------------------------------------

def test_runs_log_and_print(tmp_path, capsys, monkeypatch):
    evaluate = llm_rlvr.Trainer.evaluate                      # all would be 0
    monkeypatch.setattr(llm_rlvr.Trainer, "evaluate", lambda t: evaluate(t) | dict(
        pass1=(t.step + 1) / 10, greedy=t.step / 7))
    llm_rlvr.main([*TINY, "--algo", "tpo,pg", "--out", str(tmp_path)])
    out, logs = capsys.readouterr().out.splitlines(), []
    for algo, label in ("tpo", f"tpo (alpha {parse()[0].anchor:g})"), ("pg", "pg"):
        logs.append(log := logged(tmp_path / f"graph_color-{algo}-0" / "log.jsonl"))
        kinds = " ".join(r["kind"] for r in log)
        assert kinds == "config eval update update eval update update eval update eval result"
        assert [r["step"] for r in log[1:-1]] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
        first, last, result, metrics = log[1], log[-2], log[-1], log[2].keys() - {"kind", "step"}
        assert metrics >= {"reward", "kl", "grad_norm", "sample_tok_s", "train_tok_s"}
        for name in metrics:                                  # a mean since the evaluation before
            assert log[7][name] == pytest.approx(mean(u[name] for u in log[5:7]), abs=1e-5)
        assert last.keys() - metrics == first.keys()
        assert untimed([result]) == [dict(
            kind="result", task="graph_color", algo=algo, seed=0, steps=5,
            params=sum(p.numel() for p in tiny().trained), pass1_before=first["pass1"],
            pass1_after=last["pass1"], greedy_after=last["greedy"])]
        seconds = [r["seconds"] for r in log if "seconds" in r]
        assert [0, *seconds, 100] == sorted([0, *seconds, 100]) and result["peak_mb"] == 0
        assert last["example"]["prompt"] in out
        line = (f"{label} took graph_color from {first['pass1']:.1%} to {last['pass1']:.1%} pass@1 "
                f"(greedy {last['greedy']:.1%}) on 8 heldout puzzles in 5 updates and ")
        assert sum(line in shown for shown in out) == 2 and any(line in x for x in out[-2:])
    assert logs[0][1]["example"] == logs[1][1]["example"]     # the same weights at first


def test_progress_by_hand():
    r = dict(kind="eval", step=150, seconds=30.2, pass1=0.5, greedy=0.25, reward=1, kl=1.5,
             informative=0.5, train_tok_s=123_456)
    assert llm_rlvr.progress(r, 750) == ("150/750 pass@1 0.500 greedy 0.250 reward 1.00 KL(q||p) "
                                         "1.50 informative 50% 123456 tok/s 121 s left")
    assert llm_rlvr.progress(dict(r, step=1), 31).endswith(" 906 s left")


def test_plots_are_drawn(tmp_path, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    bandit.main(f"--seeds 1 --steps 20 --plot {tmp_path}/figure.png".split())
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(Figure, "savefig", Figure.savefig)    # put back after the spy's
    saved = spy(Figure, "savefig")
    train(tmp_path, "--plot")
    ((figure, path), _), = saved
    assert path == tmp_path / RUN_0 / "pass1.png" and path.exists()
    assert [len(axis.lines) for axis in figure.axes] == [1, 1]


def test_seconds_count_the_warm_start_and_the_run_before(tmp_path, monkeypatch):
    tick = itertools.count().__next__
    monkeypatch.setattr(llm_rlvr, "time", SimpleNamespace(monotonic=tick, perf_counter=tick))
    monkeypatch.setattr(llm_rlvr.Trainer, "warm_start", lambda t: [tick() for _ in range(90)])
    train(tmp_path)
    (tmp_path / RUN_0 / "checkpoint.pt").unlink()
    seconds = [r["seconds"] for r in train(tmp_path, "--resume") if "seconds" in r]
    assert seconds[0] > 90 and seconds == sorted(seconds)


@each("dies_in", ["update", "evaluate"])
def test_resumed_run_is_the_same_to_the_bit(dies_in, tmp_path, capsys, monkeypatch):
    flags, folder = "--epochs 2 --warm-steps 60", tmp_path / RUN_0
    whole = train(tmp_path / "whole", flags)
    assert all(r["grad_norm"] > 0 for r in whole if r["kind"] == "update" and r["step"] > 1)

    def dies(t, real=getattr(llm_rlvr.Trainer, dies_in)):
        if t.step == 3 or dies_in == "evaluate" and t.step:
            raise KeyboardInterrupt
        return real(t)

    with monkeypatch.context() as patch:
        patch.setattr(llm_rlvr.Trainer, dies_in, dies)
        one_line(capsys, "interrupted --resume", train, tmp_path, flags, status=130)
    assert torch.load(folder / "checkpoint.pt")["step"] == 2
    (folder / "log.jsonl").write_text("{half a li", encoding="utf-8")       # the checkpoint has it
    again = train(tmp_path, flags + " --resume --recompute --micro-tokens 9999")    # may change
    assert untimed(again)[1:] == untimed(whole)[1:]
    a, b = (torch.load(f / RUN_0 / "checkpoint.pt") for f in (tmp_path, tmp_path / "whole"))
    for name in "model", "optimizers", "generator", "rng":
        close(a[name], b[name], rtol=0, atol=0)
    stops = lambda t: signal.raise_signal(signal.SIGINT)      # begun anew, and stopped at once
    monkeypatch.setattr(llm_rlvr.Trainer, "warm_start", stops)
    one_line(capsys, "interrupted", train, tmp_path, flags, status=130)
    assert not list(folder.glob("checkpoint*"))


def test_a_damaged_checkpoint_is_told_and_without_it_the_one_before_continued(tmp_path, capsys):
    whole = train(tmp_path, "--warm-steps 60")
    last, before = (tmp_path / RUN_0 / f"checkpoint{end}.pt" for end in ("", ".previous"))
    data = last.read_bytes()
    middle = data.index(b"data/1") + 200                    # a weight: torch.load does not notice
    last.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:])
    assert torch.load(last)["step"] == 5 and torch.load(before)["step"] == 4
    for damaged in last.read_bytes(), data[:-100], b"":
        last.write_bytes(damaged)
        one_line(capsys, f"--resume: {last} damaged delete it", train, tmp_path,
                 "--warm-steps 60 --resume")
        assert last.read_bytes() == damaged
    last.unlink()
    assert untimed(train(tmp_path, "--warm-steps 60 --resume")) == untimed(whole)


def test_slow_run_keeps_others_out_and_killed_twice_is_the_same_to_the_bit(tmp_path):
    command = ["llm_rlvr.py", *TINY, *"--warm-steps 60 --steps 60 --out".split(), tmp_path / "cut"]
    for signum, step, more in (signal.SIGINT, "4/", []), (signal.SIGKILL, "20/", ["--resume"]):
        process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:], *more],
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while f"{step}60 " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        other = run_script(*command, *more)
        assert other.returncode == 2 and f"process {process.pid} " in other.stderr
        process.send_signal(signal.SIGCONT)
        process.send_signal(signum)
        out, error = process.communicate(timeout=60)
        if signum == signal.SIGINT:
            assert process.returncode == 130
            assert error.count("\n") == 1 and "interrupted; --resume" in error
    for more in ["--resume"], ["--out", tmp_path / "whole"]:
        assert run_script(*command, *more).returncode == 0
    cut, whole = (logged(tmp_path / name / RUN_0 / "log.jsonl") for name in ("cut", "whole"))
    assert untimed(cut) == untimed(whole) and cut[-3]["grad_norm"] > 0


class Code:
    """A pickle of it makes a folder when it is read."""
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@each("change, flags, words", [
    ({"device": "cuda"}, "", "--device cpu cuda"), ({"lr": Code()}, "", "--resume damaged"),
    ({}, "--lr 0.5", f"--lr 0.5 {parse()[0].lr}")])
def test_resume_refuses(change, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / RUN_0 / "checkpoint.pt"
    path.parent.mkdir()
    state = tiny().state()
    state["records"][0] |= change
    torch.save(state, path)
    before = path.read_bytes()
    one_line(capsys, f"{words} {path.parent}", train, tmp_path, "--resume " + flags)
    assert not Path("code-ran").exists() and path.read_bytes() == before


@each("error", [OSError(28, "No space"), RuntimeError("No space")])
def test_full_disk_keeps_the_old_file(error, tmp_path, capsys, monkeypatch):
    def save(_, file):
        file.write(b"half")
        raise error

    path = tmp_path / "checkpoint.pt"
    llm_rlvr.write(path, "old")
    monkeypatch.setattr(torch, "save", save)
    one_line(capsys, f"{path} No space intact", llm_rlvr.write, path, {}, status=1)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


@each("score, said", [("math.nan", "nan"), ("None", "NoneType"), ("'1'", "not str"),
                      ("1j", "not complex"), ("1 / 0", "by zero")])
def test_scores_that_are_no_numbers_are_one_line(score, said, tmp_path, capsys, monkeypatch):
    train(tmp_path, "--steps 2")
    monkeypatch.setattr(llm_rlvr.GraphColor, "check", lambda *_: eval(score))
    words = "--task graph_color key ['A-B', allowed finite "
    one_line(capsys, words + said, train, tmp_path, "--steps 2 --resume", status=1)
    assert torch.load(tmp_path / RUN_0 / "checkpoint.pt")["step"] == 2


def test_a_gradient_that_is_not_finite_is_one_line(capsys):
    t = tiny()
    t.score, t.slope = lambda *_: torch.eye(6, 4), lambda logp, *_: logp / 0
    one_line(capsys, f"gradient nan update 1 --lr {t.c.lr} --eta {t.c.eta}", t.update, status=1)


def test_readmes_task_of_ones_own_runs_with_a_snowman_in_ascii(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")
    (block,) = (b.split("```")[0] for b in blocks if "llm_rlvr.TASKS[" in b)
    Path("mine.py").write_text(block.replace('" >"', '" \N{SNOWMAN}"'), encoding="utf-8")
    run = run_script(tmp_path / "mine.py", *TINY, "--task", "reverse")
    assert run.returncode == 0 and "took reverse from" in run.stdout, run.stderr
    assert r"\u2603" in run.stdout and not run.stderr


def test_slow_small_run_learns(tmp_path):
    """pass@1 rises by more than five standard errors of 1,024 samples."""
    flags = "--warm-steps 60 --width 64 --layers 2 --prompts 24 --candidates 16 --lr 3e-2"
    r = train(tmp_path, flags + " --anchor 0 --steps 70 --eval-every 70 --eval-puzzles 256")[-1]
    assert r["pass1_before"] < 0.15 and r["pass1_after"] > r["pass1_before"] + 5 * 0.4 / 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_in_bf16_is_near_fp32_on_a_cpu():
    gpu, cpu = (tiny(f"--device {device} --width 64 --epochs 2") for device in ("cuda", "cpu"))
    on_gpu = gpu.rollout(training_puzzles(gpu, 6))
    close(on_gpu.logp_old, gpu.current_logp(on_gpu, 1), atol=1e-5, rtol=0)     # one kind of forward
    rollout = llm_rlvr.Rollout(*(x.cpu() for x in on_gpu))
    close(rollout.logp_old, cpu.current_logp(rollout, 1), atol=0.1, rtol=0)
    gpu.score = lambda *_: torch.eye(6, 4)
    assert gpu.update()["grad_norm"] > 0


# ---- the repository ------------------------------------------------------------------------------

SHORT = "seqtask.py --length 3 --batch 9 --episodes 9 --algo tpo,grpo"


@each("command, pipe", [(SHORT, ""), (SHORT, " | head -1"), ("bandit.py --help", " | true"),
                        (f"llm_rlvr.py {' '.join(TINY)}", " | head -1")])
def test_scripts_print_in_ascii_and_end_with_their_reader(command, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_script(*command.split(), pipe=pipe)
    assert run.stderr == "" and (pipe or "error ? s.e." in run.stdout)


def test_lines_fit_and_imports_go_one_way_without_effects(tmp_path, monkeypatch):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("recipes/*.py"), *ROOT.glob("results/**/*.py")):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100, path
    names = "tpo", "baselines", "bandit", "seqtask", "llm_rlvr"
    for name in names:
        code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"(?m)^ *(from|import) (bandit|seqtask|llm_rlvr)\b", code), name
    monkeypatch.chdir(tmp_path)
    Path("all.py").write_text("import " + ", ".join(names), encoding="utf-8")
    run = run_script(tmp_path / "all.py")
    assert run.stdout + run.stderr == "" and len(list(tmp_path.iterdir())) == 1
