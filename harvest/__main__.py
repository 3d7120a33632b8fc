"""The command line of the harvest.

    python -m harvest plan   configs/harvest/demo.yaml      what would be done: records, shards, forwards, bytes
    python -m harvest plan   configs/harvest/demo.yaml --probe --hours 168 --gpus 8 --disk 3T      what would fit
    python -m harvest doctor configs/harvest/demo.yaml      whether machine, disk and folder are fit for it
    python -m harvest run    configs/harvest/demo.yaml      do it; the same command again goes on where it stopped
    python -m harvest status out/demo/set                   what a set holds, from the set alone
    python -m harvest verify out/demo/set                   read every byte of a set against its checksums
    python -m harvest add-samples out/demo/set configs/harvest/demo.yaml --prompt "a small star"
    python -m harvest convert out/demo/set out/demo/tar --to tar

Any key of the configuration can be laid over: `--set steps=10 --set teacher.device=cpu`.
"""

from common.cli import Command, LazyGroup

main = LazyGroup(
    name="harvest",
    help="Ask a diffusion teacher once; write what it said to a shard set.",
    commands={
        "plan": Command("harvest.commands:plan", "What a run would do: records, shards, forwards, bytes."),
        "doctor": Command("harvest.commands:doctor", "Whether machine, disk and folder are fit for a harvest."),
        "prepare": Command("harvest.commands:prepare", "Convert the teacher's weights once, so that it loads fast."),
        "run": Command("harvest.commands:run", "Harvest. The same command again goes on where it stopped."),
        "status": Command("harvest.commands:status", "What a set holds and who works on it, from the set alone."),
        "verify": Command("harvest.granary.commands:verify", "Every byte of a set against its checksums."),
        "repair": Command("harvest.commands:repair", "Ask again for what is damaged or quarantined."),
        "inspect": Command("harvest.commands:inspect", "One record in numbers, and the picture that was drawn."),
        "add-samples": Command("harvest.commands:add_samples", "Prompts that training will draw, left in the assets."),
        "rebuild": Command("harvest.granary.commands:rebuild", "Lost receipts again, from the shards."),
        "convert": Command("harvest.granary.commands:convert", "The same records in another container."),
        "merge": Command("harvest.granary.commands:merge", "One set out of several of one contract."),
        "subset": Command("harvest.granary.commands:subset", "Some of a set: by prompt, size, noise level, held-out."),
        "diff": Command("harvest.granary.commands:diff", "What two sets have in common and what not."),
        "push": Command("harvest.granary.commands:push", "Copy a set: resumed, verified on arrival, freed if asked."),
        "pull": Command("harvest.granary.commands:pull", "The same, from there to here."),
    },
)

if __name__ == "__main__":
    main()
