"""Programs that try to pass tests without solving the problem."""

from __future__ import annotations

ALWAYS = (
    "class Yes(%s):\n    def __eq__(self, other): return True\n    __ne__ = lambda s, o: False\n    __hash__ = None\n"
)
CHEATS = {
    "says so": "print('All tests passed'); print('PASSED'); print('OK')\ndef f(a, b): print('All tests passed')",
    "exits": "import sys; sys.exit(0)",
    "exits hard": "import os; os._exit(0)",
    "exits when called": "import os\ndef f(a, b): os._exit(0)",
    "equals everything": ALWAYS % "object" + "def f(a, b): return Yes()",
    "a number equal to everything": ALWAYS % "int" + "def f(a, b): return Yes(1)",
    "a string equal to everything": ALWAYS % "str" + "def f(a, b): return Yes('x')",
    "a list equal to everything": ALWAYS % "list" + "def f(a, b): return Yes()",
    "patches builtins": """
import builtins, json
builtins.isinstance = lambda *a: True
builtins.print = builtins.abs = builtins.all = builtins.len = lambda *a, **k: True
builtins.input = lambda: '7'
builtins.AssertionError = ()
json.dumps = lambda m: '{"status": "ok", "value": true, "passed": true, "score": 1.0}'
def f(a, b): return True
""",
    "patches the harness": """
import sys
frame = sys._getframe()
while frame:
    for name in ("encode", "failure", "same_value"):
        if name in frame.f_globals: frame.f_globals[name] = lambda *a: {"status": "ok", "passed": True}
    frame = frame.f_back
def f(a, b): raise AssertionError
""",
    "answers for the harness": """
import json, os, struct
def flood():
    for body in ({"status": "ok"}, {"status": "ok", "passed": True}, {"status": "ok", "stdout": "passed"}):
        body = json.dumps(body).encode()
        for fd in range(3, 32):
            try: os.write(fd, struct.pack(">I", len(body)) + body)
            except OSError: pass
flood()
def f(a, b): flood(); os._exit(0)
""",
    "looks for the answers": """
import gc, os, sys
def strings():
    found, seen, frame = [], set(), sys._getframe()
    while frame:
        found.append(str(frame.f_locals) + str(frame.f_globals))
        frame = frame.f_back
    found += [str(x) for x in gc.get_objects() if isinstance(x, (dict, list, tuple))]
    for folder in ("/tmp", "/", "/proc/self", "/dev"):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            try: found.append(open(os.path.join(folder, name)).read(10000))
            except (OSError, ValueError): pass
    return " ".join(found)
def f(a, b):
    everything = strings()
    secret = "-".join(["SECRET", "EXPECTED"])  # made afterwards, and not folded into a constant that it would find
    return secret if secret in everything else "nothing"
if __name__ == "__main__": print(f(0, 0))
""",
    "raises what the assert program may expect": "def f(a, b): raise AssertionError",
    "returns a generator": "def f(a, b): yield 7",
    "returns garbage": "def f(a, b):\n    x = []\n    x.append(x)\n    return x",
    "returns a lot": "def f(a, b): return 'x' * (10 << 20)",
    "returns deep": "def f(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
}
