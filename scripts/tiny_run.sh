# Sourced by scripts that compare ways to run: a recipe of a few seconds, and what a finished run is.

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
recipe=$work/tiny.toml
mesh=(--set mesh.dp=2 --set mesh.x=2)

tiny_recipe() {
    head -c 30000 data/shakespeare/valid.txt > "$work/corpus.txt"
    cat > "$recipe" <<END
run = { dir = "$work/run" }
model = { layers = 2, width = 96, heads = 6 }
tokenizer = { vocab = 300 }
data = { path = "$work/corpus.txt" }
train = { steps = 120, batch = 2, context = 32, warmup = 2 }
eval = { every = 60, batches = 2 }
checkpoint = { every = 30 }
END
}

# Weights and training state of two finished runs are the same bits.
same_state() {
    local one two
    one=$(cd "$1" && sha256sum model.safetensors state/step-00000120/state.bin)
    two=$(cd "$2" && sha256sum model.safetensors state/step-00000120/state.bin)
    echo "$one"
    if [ "$one" != "$two" ]; then
        echo "$2 differs from $1:" >&2
        echo "$two" >&2
        exit 1
    fi
}
