"""Parts of the GPU run: a module each, whose rows a process of its own measures one after another (bench/gpu/run.py).

A part has

- `LIMIT_S`: seconds that one row may take; a row that takes longer is stopped, and named.
- `titles(device) -> list[str]`: its rows, in order of worth, cheap to list. A title is unique in its part and stays the
  same from run to run: by it `--resume` knows what has been done.
- `row(title, device) -> dict`: does one row. The values are JSON's. Whatever it raises becomes the row's `absent`; what
  cannot be measured on this machine (a package, a tool) returns `{"absent": reason}`.

The device (bench/gpu/device.py) is the only way to the GPU's clocks, so that the same part runs on a fake one. A row of
times, which the answer sheet reads, has these fields; others may stand beside them:

    op, direction, dtype, m, shape   what was run: "lora_linear", "forward" or "backward" (or "step": both), "bf16",
                                     rows of x, "4096x14336" (in x out features; of what has no such, any text)
    times      {candidate: {"graph_s": s, "eager_s": s}}: medians; a clock that cannot be had is left out
    refused    {candidate: reason}: what was not measured, and why
    bound_s    the least seconds that the measured ceilings allow

A candidate that is one of our backends has its name ("cuda", "triton", "native"), or begins with it and a blank
("triton panels"). Before it is run `device.wrong(op, backend, direction, dtype, m)` is asked: what the tests found
wrong is refused with that reason; the worker takes out what was measured all the same. And `device.trying(candidate)`
is told: if the process is lost then, by a sticky error, a crash or a hang, the row is done again, and finds the
candidate in `device.lost`, to be left out; its reason comes into `refused`. A row that named none is given up. The
worker waits for the device after each row, so that an error is the row's in which it came.

`device.fake` asks for small shapes and few of them, and its clocks give the same made-up numbers in every run, as long
as a row reads them in the same order. A part has its place and its share of the time in bench/gpu/plan.py. One that
has `run(device, settings, limit) -> int` in place of titles and rows writes its file itself (parts/tests.py).
"""
