"""python runs/probe.py EVALDIR ROWS: shares of word-for-word, result, places, boxes per task."""

import json, sys, re, math
from collections import defaultdict

rows = [json.loads(l) for l in open(sys.argv[2])]
preds = [json.loads(l) for l in open(sys.argv[1] + "/predictions.jsonl")]
out = defaultdict(lambda: defaultdict(list))


def facts(t):
    return [(n, tuple(map(int, x.split()))) for n, x in re.findall(r"([a-z]+)((?: \d+)+)", t)]


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0
    i = w * h
    return i / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - i)


for p in preds:
    i = int(str(p.get("where", p.get("id"))).split(":")[-1]) - 1
    r = rows[i]
    c = r["messages"][0]["content"]
    kind = (
        "told"
        if len(c) == 1
        else "video"
        if c[0]["type"] == "video"
        else "views"
        if len(c) > 2
        else "one"
    )
    t = r["messages"][1]["content"]
    g = (p.get("prediction") or p.get("completion") or "").strip()
    o = out[kind, r["question_type"]]
    o["exact"].append(g == t)
    if ": " in t and r["question_type"] != "read":
        o["result"].append(g.split(": ")[-1] == t.split(": ")[-1])
    ft, fg = (
        facts(t.split(":")[0] if r["question_type"] not in ("nearest", "turn") else t),
        facts(g.split(":")[0] if r["question_type"] not in ("nearest", "turn") else g),
    )
    if r["question_type"] in ("say", "compare", "apart", "total", "nearest", "turn"):
        dg = dict(fg)
        for n, x in ft:
            if len(x) == 2:
                o["place"].append(n in dg and len(dg[n]) == 2 and math.dist(dg[n], x) <= 2)
    if r["question_type"] == "show":
        dg = dict(facts(g))
        for n, x in facts(t):
            o["iou"].append(iou(dg[n], x) if n in dg and len(dg[n]) == 4 else 0)
for k in sorted(out):
    print(*k, len(out[k]["exact"]), {m: round(sum(v) / len(v), 2) for m, v in out[k].items() if v})
