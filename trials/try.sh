# sh runs/try.sh OUT BASE LIMIT "s1 flags" "s2 flags" "cold flags": SFT rungs and their scores on validation rooms
O=$1; B=$2; L=$3; V=${V:-runs/tiny/rooms/val}
export OMP_NUM_THREADS=1
ev() { python eval.py --threads 1 --model $O/$1 --bench rooms --data $V --blind-from runs/tiny/rooms/train --out $O/eval/$1 --prompt-style $2 --max-completion-length 64 --limit $L > $O/eval-$1.txt 2>&1; tail -13 $O/eval-$1.txt; }
mkdir -p $O
python train_sft.py --stage 1 --model $B --out $O/stage1 $4 > $O/s1.log 2>&1; ev stage1 direct
python train_sft.py --stage 2 --model $O/stage1 --out $O/stage2 $5 > $O/s2.log 2>&1; ev stage2 direct
python train_sft.py --stage cold --model $O/stage2 --out $O/cold $6 > $O/cold.log 2>&1; ev cold thinking
