#!/bin/bash
# The runs of 10_tokens/ and 10_tokens_smaller/, most important first. Runs that a folder has are not repeated: stop it
# and start it again.
#   nice -n 19 examples/quality/10_tokens.sh [FOLDER]      one process on one core
set -e
OUTPUT=${1:-examples/quality/10_tokens}
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# Without these glibc gives memory back and takes it anew in every step: a quarter of the time.
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456

# All of Python 3.11.7's standard library, its tests too: 31,525,166 bytes, 14.3 million tokens to train
# on. No run sees one twice.
TEXT=${TEXT:-runs/stdlib.txt}
mkdir -p "$(dirname "$TEXT")"
if [ ! -e "$TEXT" ]; then
    (cd "$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
     find . -name '*.py' -not -path '*/site-packages/*' | LC_ALL=C sort | xargs cat | iconv -c -f utf-8 -t utf-8) > "$TEXT"
fi

runs() {
    hf-sdp simulate --layers 6 --heads 4 --evaluations 10 --eval-sequences 256 --text "$TEXT" --compile \
        --note "commit $(git rev-parse --short HEAD), one core of $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2)" "$@"
}
simulate() {
    runs --steps 3770 --lr-sweep 0.002,0.004,0.008 --output "$OUTPUT" "$@"
}
smaller() {
    runs --hidden 32 --mlp 96 --steps 1110 --lr-sweep 0.004,0.008,0.016 --output "${OUTPUT}_smaller" "$@"
}
SIZES=data-parallel,small@0.5,forward-neuron-linear@0.5,forward-neuron-linear@0.5+1:0.4,forward-block-linear@0.5+1:0.4
SIZES=$SIZES,forward-neuron-linear@0.5+1:0.6,forward-neuron-linear@0.5+1:0.8
FIRST=data-parallel,forward-neuron-linear@0.5+1:0.6,forward-neuron-linear@0.5+1:0.4,small@0.5,forward-neuron-linear@0.5,forward-neuron-linear@0.5+1:0.2
FIRST=$FIRST,forward-block-linear@0.5+1:0.4,small@0.25
THEN=forward-neuron@0.5,forward-neuron@0.5+1:0.6,forward-neuron-linear@0.5+1:0.8,forward-neuron-linear@0.5+1:0.1
THEN=$THEN,forward-block@0.5,forward-neuron@0.25+0.5:0.6+1:0.2
THEN=$THEN,forward-neuron@0.5+backward:0.4,forward-block-linear@0.5

simulate --seeds 0 --methods "$FIRST"
# Beyond the edge of the sweep, for those whose best rate is there.
simulate --seeds 0 --methods data-parallel/0.016,small@0.5/0.001,forward-block-linear@0.5+1:0.4/0.016
smaller --seeds 0,1,2 --methods "$SIZES"
smaller --seeds 0 --methods forward-neuron-linear@0.5+1:0.6/0.032,forward-neuron-linear@0.5/0.032,forward-neuron-linear@0.5+1:0.4/0.002
simulate --seeds 0,1,2 --methods "$FIRST"
simulate --seeds 0,1,2 --methods "$THEN"
simulate --seeds 0 --methods forward-neuron@0.25+0.5:0.6+1:0.2/0.001
simulate --seeds 0,1,2 --methods forward-neuron@0.5~rolling50/0.004,forward-neuron@0.5~rolling10/0.004
simulate --seeds 0 --methods forward-neuron-linear@0.5~rolling10+1:0.6/0.004
for k in 10 50 200; do
    simulate --seeds 0 --methods "forward-neuron@0.5~random$k,forward-neuron@0.5~rolling$k"
done
