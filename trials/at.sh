# sh trials/at.sh STEP ROWS: the base after STEP steps on held-out rows ROWS.jsonl (nice, one thread)
S=$(printf %06d $1); D=runs/at$S
[ -f $D/model/config.json ] || nice -n 19 python train_sft.py --stage base --model runs/base/first --curriculum 1 --threads 1 --out $D/model --resume runs/base/model/resume/step-$S --max-steps $1 > $D.log 2>&1
nice -n 19 python eval.py --threads 1 --model $D/model --bench runs/base/rooms/val/$2.jsonl --images runs/base/rooms/val/images --limit 10000 --prompt-style direct --max-completion-length 72 --out $D/$2 >> $D.log 2>&1
python trials/probe.py $D/$2 runs/base/rooms/val/$2.jsonl
