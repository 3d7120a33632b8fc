"""The command line of the training side.

    python -m train init   --teacher DIR --student configs/students/shapes.json --out out/demo/init
    python -m train plan   configs/train/demo.yaml --gpus 4 --memory 24
    python -m train run    configs/train/demo.yaml          train; the same command again goes on where it stopped
    python -m train run    configs/train/demo.yaml --check    one batch through everything, each part timed
    torchrun --nproc-per-node 2 -m train run configs/train/demo.yaml     as accelerate launch and srun do it, too
    python -m train sample out/demo/run --out out/demo/pictures.png
    python -m train eval   out/demo/run --grader tests.shapes.grade:grade
    python -m train export out/demo/run --out out/demo/student --text-encoder DIR
    python -m train verify out/demo/run                     every byte of its checkpoints
    python -m train status out/demo/run

Any key of the configuration can be laid over: `--set lr=1e-3 --set batch_size=16`.
"""

from common.cli import Command, LazyGroup

main = LazyGroup(
    name="train",
    help="Distil a small image student from a shard set; no teacher in memory.",
    commands={
        "init": Command("train.commands:init", "A student's first weights, cut from a teacher's folder."),
        "plan": Command("train.commands:plan", "What a training would need: memory by part, steps, time."),
        "run": Command("train.commands:run", "Train. The same command again goes on where it stopped."),
        "sample": Command("train.commands:sample", "Pictures by the student, beside the teacher's own."),
        "eval": Command("train.commands:evaluate", "How far the student is from its teacher; a grader's scores."),
        "export": Command("train.commands:export", "A student as diffusers, ComfyUI or another trainer opens it."),
        "verify": Command("train.commands:verify", "Every byte of a run's checkpoints against their checksums."),
        "status": Command("train.commands:status", "Where a run stands, from its folder alone."),
    },
)

if __name__ == "__main__":
    main()
