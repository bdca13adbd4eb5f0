import json, sys, re


def go(d):
    R = {}
    for l in open("runs/tiny/rooms/val/spld_coldstart_data.jsonl"):
        r = json.loads(l)
        R[str(r["question_id"]), r["question_type"]] = r
    from collections import defaultdict

    c = defaultdict(lambda: [0, 0, 0, 0])
    for l in open(d + "/predictions.jsonl"):
        p = json.loads(l)
        r = R.get((str(p["id"]), p["question_type"]))
        if not r or not r["options"]:
            continue
        m = re.search(r": ([a-z, -]+?) ?([A-D])?</think><answer> ?([A-D])<", p["completion"])
        k = p["question_type"] + (
            " cam" if r["data_type"] == "single_image" and "dir" in p["question_type"] else ""
        )
        c[k][0] += 1
        if not m:
            continue
        o = dict((x.split(". ", 1)[0], x.split(". ", 1)[1]) for x in r["options"])
        c[k][1] += o.get(m[3]) == m[1].strip()
        c[k][2] += m[1].strip() == o[r["answer"]]
        c[k][3] += m[3] == r["answer"]
    for k, v in c.items():
        print(
            d,
            k,
            v[0],
            "letter fits word",
            round(v[1] / v[0], 2),
            "word right",
            round(v[2] / v[0], 2),
            "letter right",
            round(v[3] / v[0], 2),
        )


for d in sys.argv[1:]:
    go(d)
