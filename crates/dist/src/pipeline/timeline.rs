//! A walk as text: one line a stage, one column a unit of time.
//! F forward, B backward, I gradients of inputs, W gradients of weights, then the microbatch, then
//! the chunk as a letter where a stage has several; `.` is the bubble.

use super::{Span, Walk, Work};
use std::fmt;

impl fmt::Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = || self.spans.iter().flatten();
        let chunks = all().map(|span| span.unit.chunk).max().unwrap_or(0) + 1;
        let width = all().map(|span| label(span, chunks).len()).max().unwrap_or(1) + 1;
        for (stage, spans) in self.spans.iter().enumerate() {
            let mut line = format!("stage {stage:<2}");
            let mut clock = 0;
            for span in spans {
                let (start, end) = (span.start.round() as usize, span.end.round() as usize);
                for _ in clock..start {
                    line += &format!(" {:<width$}", ".");
                }
                for tick in start..end {
                    let text = if tick == start { label(span, chunks) } else { "-".repeat(width) };
                    line += &format!(" {text:<width$}");
                }
                clock = end;
            }
            for _ in clock..self.makespan.round() as usize {
                line += &format!(" {:<width$}", ".");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn label(span: &Span, chunks: usize) -> String {
    let work = match span.unit.work {
        Work::Forward => 'F',
        Work::Backward => 'B',
        Work::BackwardInput => 'I',
        Work::BackwardWeight => 'W',
    };
    let chunk = match chunks {
        1 => String::new(),
        _ => ((b'a' + (span.unit.chunk % 26) as u8) as char).to_string(),
    };
    format!("{work}{}{chunk}", span.unit.microbatch)
}
