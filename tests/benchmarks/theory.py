"""How long theory and first samples take in a fresh process: ``python -m tests.benchmarks.theory [case ...]``.

Every case runs in an interpreter of its own, without a cache of compiled code; import is timed apart. One table,
kept in docs/performance.
"""

import json
import subprocess
import sys

ENDPOINT = "task = bk.tasks.endpoint([[1.0]], [{y}], {steps})"
FOUR = "import numpy as np; task = bk.tasks.endpoint(2 * np.eye(4), [2.5, 2.5, -2.5, -2.5], 4)"
DIGITS = "task = bk.tasks.digits(patterns_per_class={count}, steps=4).scaled(2.0)"
RANDOM = (
    "import numpy as np; rng = np.random.default_rng(0); inputs = rng.normal(size=(6, {count}, {features}));"
    "targets = np.full((6, {count}), np.nan); targets[-1] = rng.normal(size={count}); task = bk.Task(inputs, targets)"
)
SAMPLE = (
    "import jax; bk.sample(jax.random.key(0), bk.Network({width}, 'erf', noise=0.1), task,"
    "num_warmup=1, num_samples=1, num_chains=1, progress=False); said = ''"
)


def solve(activation, noise=0.1, sharing="tied", after=""):
    return f"theory = bk.solve(bk.Network(1024, {activation!r}, {sharing!r}, noise={noise}), task){after}; said = story(theory)"


CASES = {
    "import": ("", "said = ''"),
    "linear, T = 3": (ENDPOINT.format(y=4.5, steps=3), solve("linear", 0.5)),
    "linear, T = 3, with kernel_std": (
        ENDPOINT.format(y=4.5, steps=3),
        solve("linear", 0.5, after="; theory.kernel_std()"),
    ),
    "erf, T = 3": (ENDPOINT.format(y=2.0, steps=3), solve("erf")),
    "erf, T = 4, P = 4": (FOUR, solve("erf")),
    "erf, digits, d = 16": (DIGITS.format(count=2), solve("erf", 0.3)),
    "critical signal, erf, T = 3": (
        ENDPOINT.format(y=1.0, steps=3),
        "found = bk.critical_signal(bk.Network(64, 'erf', noise=0.1), task); said = f'{found.spinodal:.6f}'",
    ),
    "first sample, d = 3": (ENDPOINT.format(y=2.0, steps=3), SAMPLE.format(width=256)),
    "first sample, d = 16": (FOUR, SAMPLE.format(width=256)),
    "linear, d = 300": (RANDOM.format(count=50, features=60), solve("linear")),
    "linear, d = 300, untied": (
        RANDOM.format(count=50, features=60),
        solve("linear", sharing="untied"),
    ),
    "linear, d = 1020": (RANDOM.format(count=170, features=180), solve("linear")),
    "linear, digits, d = 1000": (DIGITS.format(count=125), solve("linear", 0.3)),
    "erf, digits, d = 64": (DIGITS.format(count=8), solve("erf", 0.3)),
    "erf, digits, d = 256": (DIGITS.format(count=32), solve("erf", 0.3)),
    "erf, digits, d = 1024": (DIGITS.format(count=128), solve("erf", 0.3)),
}
SCRIPT = """
import json, time
began = time.perf_counter()
import bayeskernel as bk
imported = time.perf_counter() - began

def story(theory):
    C, error = theory.kernel, theory.monte_carlo_error
    return f"{{theory.result}}, error {{(error**2).sum()**0.5 / (C**2).sum()**0.5:.2%}}"

{setup}
began = time.perf_counter()
{code}
print(json.dumps([imported, time.perf_counter() - began, said]))
"""


def run(case):
    setup, code = CASES[case]
    script = SCRIPT.format(setup=setup, code=code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    print("| case | seconds | |\n|---|---|---|")
    for case in sys.argv[1:] or CASES:
        imported, seconds, said = run(case)
        print(f"| {case} | {imported if case == 'import' else seconds:.2f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
