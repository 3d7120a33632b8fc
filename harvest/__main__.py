"""The command line of the harvest.

    python -m harvest plan   configs/harvest/demo.yaml      what would be done: records, shards, forwards, bytes
    python -m harvest run    configs/harvest/demo.yaml      do it; the same command again goes on where it stopped
    python -m harvest status out/demo/set                   what a set holds, from the set alone
    python -m harvest verify out/demo/set                   read every byte of a set against its checksums

Any key of the configuration can be laid over: `--set steps=10 --set teacher.device=cpu`.
"""

from common.cli import Command, LazyGroup

main = LazyGroup(
    name="harvest",
    help="Ask a diffusion teacher once; write what it said to a shard set.",
    commands={
        "plan": Command("harvest.commands:plan", "What a run would do: records, shards, forwards, bytes."),
        "run": Command("harvest.commands:run", "Harvest. The same command again goes on where it stopped."),
        "status": Command("harvest.commands:status", "What a set holds and who works on it, from the set alone."),
        "verify": Command("harvest.commands:verify", "Read every byte of a set against its checksums."),
    },
)

if __name__ == "__main__":
    main()
