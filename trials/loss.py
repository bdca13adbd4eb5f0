import json, sys

rows = [json.loads(l) for l in open(sys.argv[1])]
n = int(sys.argv[2])
for i in range(0, len(rows), n):
    part = rows[i : i + n]
    print(
        part[-1]["step"],
        round(sum(r["loss"] for r in part) / len(part), 3),
        round(sum(r["step_time"] for r in part) / len(part), 3),
        round(sum(r["num_tokens"] for r in part) / len(part)),
    )
