//! Writes the table and the plot of docs/cost-model.md anew: `cargo run -p dist --example cost_model`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    std::fs::write(docs.join("cost-model.svg"), dist::cost::svg())?;
    let path = docs.join("cost-model.md");
    let page = std::fs::read_to_string(&path)?;
    let parts: Vec<&str> = page.split("<!-- table -->").collect();
    let [before, _, after] = parts[..] else {
        return Err(std::io::Error::other("docs/cost-model.md holds its table between two marks"));
    };
    let table = dist::cost::table();
    std::fs::write(path, format!("{before}<!-- table -->\n\n{table}\n<!-- table -->{after}"))
}
