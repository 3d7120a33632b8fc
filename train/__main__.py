"""The command line of the training side.

    python -m train init   --teacher DIR --student configs/students/shapes.json --out out/demo/init
    python -m train run    configs/train/demo.yaml          train; the same command again goes on where it stopped
    torchrun --nproc-per-node 2 -m train run configs/train/demo.yaml
    python -m train sample out/demo/run --out out/demo/pictures.png
    python -m train status out/demo/run

Any key of the configuration can be laid over: `--set lr=1e-3 --set batch_size=16`.
"""

from common.cli import Command, LazyGroup

main = LazyGroup(
    name="train",
    help="Distil a small image student from a shard set; no teacher in memory.",
    commands={
        "init": Command("train.commands:init", "A student's first weights, cut from a teacher's folder."),
        "run": Command("train.commands:run", "Train. The same command again goes on where it stopped."),
        "sample": Command("train.commands:sample", "Pictures by the student, beside the teacher's own."),
        "status": Command("train.commands:status", "Where a run stands, from its folder alone."),
    },
)

if __name__ == "__main__":
    main()
