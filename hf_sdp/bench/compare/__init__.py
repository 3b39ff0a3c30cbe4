"""``hf-sdp compare``: DDP, FSDP2 and SDP measured side by side, in worker processes on this machine.

run.py         all passes: memory and traffic, step times, losses
contenders.py  what is compared, with one face, also without communication; expected bytes
measure.py     what a worker measures, and what "exposed communication" is
losses.py      loss curves
report.py      Markdown, CSV, JSON; plots.py: pictures
"""
