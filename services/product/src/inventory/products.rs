//! The products by id and by sku, made for a million and for copies.
//!
//! Products stand in pages, in the order in which they were registered; beside them two indexes of their places. A copy for
//! a snapshot shares the pages, and whoever changes a product then copies its page first, once. Nothing is ever removed.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};
use lomash_contract::{ProductId, Sku};

use super::Product;

/// Products of a page: some 24 kB, which is what the first change after a copy costs.
pub(super) const PAGE_PRODUCTS: usize = 512;

/// A product under its id, so that looking for one does not follow a pointer to its details.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    id: ProductId,
    product: Product,
}

/// A page of products.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Page(Vec<Place>);

impl Page {
    pub(super) fn products(&self) -> impl Iterator<Item = &Product> {
        self.0.iter().map(|place| &place.product)
    }
}

/// All products.
#[derive(Clone, Debug, Default)]
pub(super) struct Products {
    pages: Vec<Arc<Page>>,
    by_id: HashTable<u32>,
    by_sku: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

/// The same products, registered in the same sequence.
impl PartialEq for Products {
    fn eq(&self, other: &Self) -> bool {
        self.pages == other.pages
    }
}

fn place(pages: &[Arc<Page>], place: u32) -> &Place {
    &pages[place as usize / PAGE_PRODUCTS].0[place as usize % PAGE_PRODUCTS]
}

fn sku_at(pages: &[Arc<Page>], at: u32) -> &Sku {
    &place(pages, at).product.details.sku
}

impl Products {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ProductId, &Product)> {
        self.pages.iter().flat_map(|page| page.0.iter().map(|place| (&place.id, &place.product)))
    }

    pub(super) fn get(&self, id: &ProductId) -> Option<&Product> {
        self.find(id).map(|at| &place(&self.pages, at).product)
    }

    /// The product, to change its stock or its count; its details change by [`Self::put`] alone, which knows the skus.
    pub(super) fn get_mut(&mut self, id: &ProductId) -> Option<&mut Product> {
        let at = self.find(id)? as usize;
        let page = Arc::make_mut(&mut self.pages[at / PAGE_PRODUCTS]);
        Some(&mut page.0[at % PAGE_PRODUCTS].product)
    }

    /// Who has the sku. Should two have it, which no decision of ours brings about, the one registered first.
    pub(super) fn owner(&self, sku: &Sku) -> Option<ProductId> {
        let candidates = self.by_sku.iter_hash(self.hasher.hash_one(sku)).copied();
        let owner = candidates.filter(|at| sku_at(&self.pages, *at) == sku).min()?;
        Some(place(&self.pages, owner).id)
    }

    /// Adds a product, or puts it in the place of the one with its id.
    ///
    /// # Panics
    /// At four billion products.
    pub(super) fn put(&mut self, product: Product) {
        let (id, sku_hash) = (product.details.product_id, self.hasher.hash_one(&product.details.sku));
        let at = if let Some(at) = self.find(&id) {
            let previous = self.hasher.hash_one(sku_at(&self.pages, at));
            if let Ok(entry) = self.by_sku.find_entry(previous, |candidate| *candidate == at) {
                entry.remove();
            }
            let page = Arc::make_mut(&mut self.pages[at as usize / PAGE_PRODUCTS]);
            page.0[at as usize % PAGE_PRODUCTS].product = product;
            at
        } else {
            let at = u32::try_from(self.len()).expect("fewer than four billion products");
            if self.len().is_multiple_of(PAGE_PRODUCTS) {
                self.pages.push(Arc::new(Page(Vec::with_capacity(PAGE_PRODUCTS))));
            }
            if let Some(page) = self.pages.last_mut() {
                Arc::make_mut(page).0.push(Place { id, product });
            }
            let (pages, hasher) = (&self.pages, &self.hasher);
            self.by_id.insert_unique(hasher.hash_one(id), at, |at| hasher.hash_one(place(pages, *at).id));
            at
        };
        let (pages, hasher) = (&self.pages, &self.hasher);
        self.by_sku.insert_unique(sku_hash, at, |at| hasher.hash_one(sku_at(pages, *at)));
    }

    /// Makes room for so many more in the indexes: to move an entry, they look at its product again.
    pub(super) fn reserve(&mut self, more: usize) {
        let (pages, hasher) = (&self.pages, &self.hasher);
        self.by_id.reserve(more, |at| hasher.hash_one(place(pages, *at).id));
        self.by_sku.reserve(more, |at| hasher.hash_one(sku_at(pages, *at)));
    }

    /// The pages, in the order in which the products were registered; nothing is copied.
    pub(super) fn pages(&self) -> Vec<Arc<Page>> {
        self.pages.clone()
    }

    fn find(&self, id: &ProductId) -> Option<u32> {
        self.by_id.find(self.hasher.hash_one(id), |at| place(&self.pages, *at).id == *id).copied()
    }
}

#[cfg(test)]
mod tests {
    use lomash_contract::ProductDetails;
    use uuid::Uuid;

    use super::*;

    fn product(n: usize, sku: &str) -> Product {
        let details = ProductDetails {
            product_id: ProductId(Uuid::from_u128(n as u128)),
            sku: sku.parse().expect("a valid sku"),
            name: "Oak base unit".into(),
            category: None,
            low_stock_threshold: None,
            active: true,
        };
        Product { details: Arc::new(details), quantity: 0, version: 1, count: None }
    }

    fn sku(text: &str) -> Sku {
        text.parse().expect("a valid sku")
    }

    #[test]
    fn products_are_found_by_id_and_by_sku_across_pages_and_a_copy_does_not_change() {
        let mut products = Products::default();
        let all = 2 * PAGE_PRODUCTS + 5;
        for n in 0..all {
            products.put(product(n, &format!("SKU-{n}")));
        }
        let (before, copy) = (products.clone(), products.pages());
        let id = |n: usize| ProductId(Uuid::from_u128(n as u128));
        products.get_mut(&id(3)).expect("it is there").quantity = 9;
        products.put(product(4, "OTHER"));
        assert_eq!(products.len(), all);
        assert_eq!(products.get(&id(3)).map(|product| product.quantity), Some(9));
        assert_eq!(products.owner(&sku("OTHER")), Some(id(4)));
        assert_eq!(products.owner(&sku("SKU-4")), None, "the old sku is free");
        assert!((5..all).all(|n| products.owner(&sku(&format!("SKU-{n}"))) == Some(id(n))));
        assert_eq!(copy, before.pages, "the copy is as it was");
        assert!(Arc::ptr_eq(&copy[1], &products.pages[1]), "what did not change is shared");
        assert!(!Arc::ptr_eq(&copy[0], &products.pages[0]));
    }

    #[test]
    fn of_two_with_one_sku_the_first_has_it_until_it_gives_it_away() {
        let mut products = Products::default();
        products.put(product(2, "OAK"));
        products.put(product(1, "OAK"));
        assert_eq!(products.owner(&sku("OAK")), Some(ProductId(Uuid::from_u128(2))));
        products.put(product(2, "ASH"));
        assert_eq!(products.owner(&sku("OAK")), Some(ProductId(Uuid::from_u128(1))));
    }
}
