//! Which products are lawful and what they move, decided when a model is built, before any byte
//! moves: y [M, N] = x [M, K] w [N, K]^T for the layouts of x and w gives the layout of y.

use crate::{Cut, Held, Layout, LayoutError, Mesh};

/// A dim of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Tokens of activations, outputs of weights.
    Rows,
    /// Widths of activations, inputs of weights.
    Cols,
}

/// What becomes of a product whose ranks hold summands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leave {
    /// Every rank gets the sum.
    Whole,
    /// Every rank gets its piece of the sum, cut along this side.
    Cut(Side),
}

/// What is kept between forward and backward of a product that gathers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Keep {
    /// What was gathered: least communication.
    #[default]
    Gathered,
    /// The rank's own pieces, gathered once more on the way back: least memory.
    Pieces,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Operands are gathered, one local product, the outcome is summed. 1D, weight-stationary and
    /// 3D products differ in what is gathered and along which side.
    Gather {
        /// Side of x that is gathered over the axis that cuts the outputs of w; without one, x is
        /// whole along that axis.
        enter: Option<Side>,
        /// Where the sum over the axis that cuts the inputs goes.
        leave: Leave,
        /// What is kept.
        keep: Keep,
    },
    /// Panels of x travel along rows of ranks and panels of w along columns of ranks, and each rank
    /// adds their products up (SUMMA, van de Geijn and Watts 1997).
    Panels,
}

/// A product that was found lawful.
#[derive(Clone, Debug)]
pub struct Product {
    pub(crate) mesh: Mesh,
    pub(crate) algorithm: Algorithm,
    /// Layout of x [M, K].
    pub x: Layout,
    /// Layout of w [N, K].
    pub w: Layout,
    /// Axes that cut the rows of w further in storage; it is gathered over them for each product.
    pub stored: Cut,
    /// Layout of y [M, N].
    pub y: Layout,
    /// Inputs K without padding.
    pub(crate) inputs: usize,
    /// Columns of w on one rank, padding included.
    pub(crate) inputs_here: usize,
    /// Rows of w on one rank as the product sees them, padding included.
    pub(crate) outputs_here: usize,
}

impl Product {
    /// Check x and w against each other; `rows` and `cols` say what ranks hold of w.
    pub fn new(
        mesh: &Mesh,
        algorithm: Algorithm,
        x: Layout,
        (rows, cols): (&Held, &Held),
    ) -> Result<Product, LayoutError> {
        let w = Layout::new(rows.cut, cols.cut);
        let refuse = |why| LayoutError { what: "product", a: x, b: w, why };
        if !x.partial.is_whole() || !w.partial.is_whole() {
            return Err(refuse("a sum over ranks is still to be taken"));
        }
        let y = match algorithm {
            Algorithm::Panels => panels(&x, &w).map_err(refuse)?,
            Algorithm::Gather { enter, leave, .. } => gathers(&x, &w, enter, leave).map_err(refuse)?,
        };
        let (inputs_here, outputs_here) = (cols.local_len(mesh), rows.local_len(mesh));
        let (mesh, stored, inputs) = (mesh.clone(), rows.stored, cols.dim.len());
        Ok(Product { mesh, algorithm, x, w, stored, y, inputs, inputs_here, outputs_here })
    }

    /// Whether the product needs no other rank.
    pub fn is_local(&self) -> bool {
        [self.x, self.w, self.y].iter().all(|l| l.cols.is_whole())
            && self.w.rows.is_whole()
            && self.stored.is_whole()
    }

    /// Axes over which the gradient of w is a sum after the way back: those that cut the tokens and
    /// that the product itself does not sum over.
    pub fn weight_sums(&self) -> impl Iterator<Item = crate::Axis> + use<> {
        let summed = match self.algorithm {
            Algorithm::Panels => self.w.cols,
            Algorithm::Gather { .. } => self.stored,
        };
        let gathered = match self.algorithm {
            Algorithm::Gather { enter: Some(Side::Rows), .. } => self.w.rows,
            _ => Cut::WHOLE,
        };
        self.x.rows.axes().filter(move |axis| !summed.has(*axis) && !gathered.has(*axis))
    }
}

/// SUMMA: x [M@..r, K@c], w [N@c, K@r] -> y [M@..r, N@c].
fn panels(x: &Layout, w: &Layout) -> Result<Layout, &'static str> {
    if x.cols != w.rows {
        return Err("SUMMA wants the inputs of x and the outputs of w cut over the same axis");
    }
    if w.cols.axes().any(|axis| !x.rows.has(axis)) {
        return Err("SUMMA wants the inputs of w cut over an axis that cuts the tokens of x");
    }
    if w.rows.axes().count() > 1 || w.cols.axes().count() > 1 {
        return Err("SUMMA takes one axis for rows and one for columns");
    }
    Ok(Layout::new(x.rows, w.rows))
}

fn gathers(x: &Layout, w: &Layout, enter: Option<Side>, leave: Leave) -> Result<Layout, &'static str> {
    if w.rows.axes().count() > 1 || w.cols.axes().count() > 1 {
        return Err("one axis may cut the outputs of w and one its inputs");
    }
    let mut entered = *x;
    if let (Some(side), Some(axis)) = (enter, w.rows.innermost()) {
        let cut = match side {
            Side::Rows => &mut entered.rows,
            Side::Cols => &mut entered.cols,
        };
        if cut.innermost() != Some(axis) {
            return Err(
                "x is gathered over the axis that cuts the outputs of w, which must be its innermost",
            );
        }
        *cut = cut.outer();
    }
    if entered.cols != w.cols {
        return Err("the summed dim is cut differently");
    }
    if w.rows.axes().chain(w.cols.axes()).any(|axis| entered.rows.has(axis)) {
        return Err("an axis cuts the tokens and w at once");
    }
    let mut y = Layout::new(entered.rows, w.rows);
    if let (Leave::Cut(side), Some(axis)) = (leave, w.cols.innermost()) {
        match side {
            Side::Rows => y.rows = y.rows.inside(axis),
            Side::Cols => y.cols = y.cols.inside(axis),
        }
    }
    Ok(y)
}
